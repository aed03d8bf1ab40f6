"""What the library's speed and memory are, measured beside a plain loop: `python -m benchmarks.train_step` and others.

Every script runs unchanged on a CPU and on CUDA, takes the same words (`--help`), prints its tables as markdown and
writes them with `--json`. Nothing beyond torch, numpy, safetensors and pillow is needed; torchattacks and foolbox are
measured where they are installed.
"""
