// Kernels in float32 for x86 processors with AVX2, on images that lie channels last, (N, H, W, C): a 3x3 convolution with
// padding one and stride one or two, and the gradient of its images, any other convolution, all that is done to each number by itself, also around the first two, and
// the squares of the attack of that name.
// `robustfair.execution.kernels` compiles and calls them.
//
// The first convolutions are Winograd's F(4x4, 3x3) (Lavin and Gray 2016): a tile of 4x4 results needs 36 products for each
// pair of channels where the sums as they stand need 144. With a stride of two the middle tap of a kernel reads other pixels
// than the two beside it, so that a row of four results is a product for each by the middle tap, and F(4, 2) of the other
// two with five: 81 products for 144. A thread takes some tiles at a time: it transforms what they read, multiplies, for
// each of the points, (tiles, C) by (C, K) weights, and transforms the products back.
//
// Signs are kept as one bit a number, set where it is not at or below zero, so that what is no number counts as positive
// and is handed on, as torch does.

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <utility>

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 12;  // numbers in a register, and tiles of one block of products: 24 of 32 registers
typedef __m512 Vector;
typedef uint16_t Bits;
inline Vector load(const float* from) { return _mm512_loadu_ps(from); }
inline void store(float* to, Vector value) { _mm512_storeu_ps(to, value); }
inline Vector positive_part(Vector value) { return _mm512_max_ps(Vector{}, value); }
inline Bits signs(Vector value) { return _mm512_cmp_ps_mask(value, Vector{}, _CMP_NLE_UQ); }
inline Vector gated(Vector value, Bits bits) { return _mm512_maskz_mov_ps(bits, value); }
#else
constexpr int LANES = 8, ROWS = 6;  // 12 of 16 registers
typedef __m256 Vector;
typedef uint8_t Bits;
inline Vector load(const float* from) { return _mm256_loadu_ps(from); }
inline void store(float* to, Vector value) { _mm256_storeu_ps(to, value); }
inline Vector positive_part(Vector value) { return _mm256_max_ps(Vector{}, value); }
inline Bits signs(Vector value) { return _mm256_movemask_ps(_mm256_cmp_ps(value, Vector{}, _CMP_NLE_UQ)); }
inline Vector gated(Vector value, Bits bits) {
  const __m256i each = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  __m256i set = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(bits), each), each);
  return _mm256_and_ps(value, _mm256_castsi256_ps(set));
}
#endif
constexpr int NO_MEMORY = 1, UNKNOWN = 2;
constexpr int64_t PAD = 16;            // between rows of a buffer, so that they do not meet in the same lines of a cache
constexpr int64_t BUFFER = 128 << 10;  // bytes that a thread's tiles take, about what its cache holds beside weights
constexpr int64_t LARGE = 1 << 20;     // bytes of weights from which on more tiles have to share a reading of them
constexpr int64_t FEWEST = 12, FEWEST_LARGE = 96;  // tiles at a time, or pixels
constexpr int64_t CHUNK = 8;  // channels whose weights are transformed at a time

// What is done to each number x of a channel, in this order, where it is given: gate, scale and shift, add, positive part;
// then its sign is kept.
constexpr int GATE = 1, SCALE = 2, SHIFT = 4, ADD = 8, POSITIVE = 16, KEEP = 32, ALL_PARTS = 63;
struct Pointwise {
  const Bits* gate;    // (pixels, channels) bits
  const float* scale;  // (channels)
  const float* shift;  // (channels)
  const float* add;    // (pixels, channels)
  bool positive;
  Bits* keep;  // (pixels, channels) bits

  int parts() const {
    return (gate ? GATE : 0) | (scale ? SCALE : 0) | (shift ? SHIFT : 0) | (add ? ADD : 0) | (positive ? POSITIVE : 0) |
           (keep ? KEEP : 0);
  }

  // To the numbers at place `at` of an image, of channels from `c` on, where PARTS are what is there.
  template <int PARTS>
  inline __attribute__((always_inline)) void run(Vector& value, int64_t at, int64_t c) const {
    if constexpr ((PARTS & GATE) != 0) value = gated(value, gate[at / LANES]);
    if constexpr ((PARTS & SCALE) != 0) value *= load(scale + c);
    if constexpr ((PARTS & SHIFT) != 0) value += load(shift + c);
    if constexpr ((PARTS & ADD) != 0) value += load(add + at);
    if constexpr ((PARTS & POSITIVE) != 0) value = positive_part(value);
    if constexpr ((PARTS & KEEP) != 0) keep[at / LANES] = signs(value);
  }
};

constexpr int NORM = SCALE | SHIFT | POSITIVE;
// What layers need before a convolution, and after one: forwards or backwards.
constexpr bool is_before(int parts) { return parts == 0 || parts == GATE || parts == NORM || parts == (NORM | KEEP); }
constexpr bool is_after(int parts) {
  const bool forward = !(parts & (GATE | SCALE)) && (!(parts & KEEP) || (parts & POSITIVE));
  return forward || !(parts & (SHIFT | POSITIVE | KEEP));
}
constexpr bool is_any(int) { return true; }

// Of the functions `Maker<PARTS>::made`, the one for some parts; none where `USED` says no.
template <template <int> class Maker, bool USED(int), int PARTS>
constexpr auto made() -> decltype(&Maker<0>::made) {
  if constexpr (USED(PARTS)) return &Maker<PARTS>::made;
  return nullptr;
}
template <template <int> class Maker, bool USED(int), int... PARTS>
auto chosen(int parts, std::integer_sequence<int, PARTS...>) {
  static constexpr decltype(&Maker<0>::made) all[] = {made<Maker, USED, PARTS>()...};
  return all[parts];
}
template <template <int> class Maker, bool USED(int)>
auto chosen(int parts) {
  return chosen<Maker, USED>(parts, std::make_integer_sequence<int, ALL_PARTS + 1>{});
}

// The first `count` numbers, if so many are in a register.
inline void store_some(float* to, Vector value, int64_t count) {
  alignas(64) float numbers[LANES];
  store(numbers, value);
  for (int64_t l = 0; l < std::min<int64_t>(LANES, count); ++l) to[l] = numbers[l];
}

struct Shape {
  int64_t images, height, width, in;               // of the images read
  int64_t out_height, out_width, out, stored;      // of those written: channels computed, and those that there are
  int64_t down, across;                            // tiles of an image

  int64_t tiles() const { return images * down * across; }
};

// A place (i, j) of `rows` by `columns` places an image, counted on without division.
struct Place {
  int64_t rows, columns, image, i, j;

  Place(int64_t rows, int64_t columns, int64_t number)
      : rows(rows), columns(columns), image(number / (rows * columns)), i(number / columns % rows), j(number % columns) {}

  void next() {
    if (++j < columns) return;
    j = 0;
    if (++i < rows) return;
    i = 0;
    ++image;
  }
};

// A scheme says how a row of `OUT` results is made: of `IN` numbers, which begin `BEFORE` in front of `MOVE` times the
// number of the tile, transformed to `POINTS`, whose products are transformed to the results.

// F(4, 3): matrices B^T and A^T of the paper.
struct Plain {
  static constexpr int IN = 6, POINTS = 6, OUT = 4, MOVE = 4, BEFORE = 1;

  static inline void transform(const Vector* d, int step, Vector* to, int to_step) {
    Vector a = d[4 * step] - 4.0f * d[2 * step], b = d[3 * step] - 4.0f * d[step];
    Vector c = d[4 * step] - d[2 * step], e = 2.0f * (d[3 * step] - d[step]);
    to[0] = 4.0f * d[0] - 5.0f * d[2 * step] + d[4 * step];
    to[to_step] = a + b;
    to[2 * to_step] = a - b;
    to[3 * to_step] = c + e;
    to[4 * to_step] = c - e;
    to[5 * to_step] = 4.0f * d[step] - 5.0f * d[3 * step] + d[5 * step];
  }

  static inline void transform_back(const Vector* m, int step, Vector* to, int to_step) {
    Vector a = m[step] + m[2 * step], b = m[step] - m[2 * step];
    Vector c = m[3 * step] + m[4 * step], d = m[3 * step] - m[4 * step];
    to[0] = m[0] + a + c;
    to[to_step] = b + 2.0f * d;
    to[2 * to_step] = a + 4.0f * c;
    to[3 * to_step] = b + 8.0f * d + m[5 * step];
  }

  static inline void transform_weights(const Vector* g, int step, Vector* to, int to_step) {  // G g of the paper
    Vector a = (g[0] + g[2 * step]) * (1.0f / 6), b = g[step] * (1.0f / 6);
    Vector c = (g[0] + 4.0f * g[2 * step]) * (1.0f / 24), d = g[step] * (1.0f / 12);
    to[0] = 0.25f * g[0];
    to[to_step] = -(a + b);
    to[2 * to_step] = b - a;
    to[3 * to_step] = c + d;
    to[4 * to_step] = c - d;
    to[5 * to_step] = g[2 * step];
  }
};

// F(4, 2) at the points 0, 1, -1, 2 and infinity.
struct Pair {
  static inline void transform(const Vector* d, int step, Vector* to, int to_step) {
    Vector a = d[3 * step] - d[step], b = d[3 * step] - d[2 * step];
    to[0] = 2.0f * (d[0] - d[2 * step]) + a;
    to[to_step] = b - 2.0f * d[step];
    to[2 * to_step] = b - 2.0f * (d[2 * step] - d[step]);
    to[3 * to_step] = a;
    to[4 * to_step] = d[4 * step] - d[2 * step] - 2.0f * a;
  }

  static inline void transform_back(const Vector* m, int step, Vector* to, int to_step) {
    Vector a = m[step] + m[2 * step], b = m[step] - m[2 * step];
    to[0] = m[0] + a + m[3 * step];
    to[to_step] = b + 2.0f * m[3 * step];
    to[2 * to_step] = a + 4.0f * m[3 * step];
    to[3 * to_step] = b + 8.0f * m[3 * step] + m[4 * step];
  }
};

// Stride two: of nine numbers the first, third, ... meet the outer taps, the others the middle one.
struct Strided {
  static constexpr int IN = 9, POINTS = 9, OUT = 4, MOVE = 8, BEFORE = 1;

  static inline void transform(const Vector* d, int step, Vector* to, int to_step) {
    Pair::transform(d, 2 * step, to, to_step);
    for (int i = 0; i < 4; ++i) to[(5 + i) * to_step] = d[(2 * i + 1) * step];
  }

  static inline void transform_back(const Vector* m, int step, Vector* to, int to_step) {
    Pair::transform_back(m, step, to, to_step);
    for (int i = 0; i < 4; ++i) to[i * to_step] += m[(5 + i) * step];
  }

  static inline void transform_weights(const Vector* g, int step, Vector* to, int to_step) {
    Vector first = g[0], last = g[2 * step];
    to[0] = 0.5f * first;
    to[to_step] = -0.5f * (first + last);
    to[2 * to_step] = (1.0f / 6) * (last - first);
    to[3 * to_step] = (1.0f / 6) * first + (1.0f / 3) * last;
    to[4 * to_step] = last;
    for (int i = 0; i < 4; ++i) to[(5 + i) * to_step] = g[step];
  }
};

// The gradient of the images of that: the middle tap gives the first, third, ... of eight, the outer ones the others.
struct Spread {
  static constexpr int IN = 5, POINTS = 9, OUT = 8, MOVE = 4, BEFORE = 0;

  static inline void transform(const Vector* d, int step, Vector* to, int to_step) {
    Pair::transform(d, step, to, to_step);
    for (int i = 0; i < 4; ++i) to[(5 + i) * to_step] = d[i * step];
  }

  static inline void transform_back(const Vector* m, int step, Vector* to, int to_step) {
    Pair::transform_back(m, step, to + to_step, 2 * to_step);
    for (int i = 0; i < 4; ++i) to[2 * i * to_step] = m[(5 + i) * step];
  }
};

// Pixels beside the image are zero, whatever `before` does to the others. Of tiles that read the same pixel one keeps its
// sign.
template <class Scheme, int PARTS, bool WITHIN>
inline void read_tile(const float* x, const Pointwise& before, const Shape& shape, const Place& place, float* to,
                      int64_t plane) {
  constexpr int IN = Scheme::IN, POINTS = Scheme::POINTS, OWN = Scheme::BEFORE, END = OWN + Scheme::MOVE;
  const int64_t top = Scheme::MOVE * place.i - OWN, left = Scheme::MOVE * place.j - OWN;
  const int64_t first = place.image * shape.height * shape.width;
  for (int64_t c = 0; c < shape.in; c += LANES) {
    Vector columns[POINTS * IN];
    for (int j = 0; j < IN; ++j) {
      Vector pixels[IN];
      for (int i = 0; i < IN; ++i) {
        const int64_t row = top + i, column = left + j;
        if (!WITHIN && (row < 0 || row >= shape.height || column < 0 || column >= shape.width)) {
          pixels[i] = Vector{};
          continue;
        }
        const int64_t at = (first + row * shape.width + column) * shape.in + c;
        pixels[i] = load(x + at);
        if (i >= OWN && i < END && j >= OWN && j < END)
          before.run<PARTS>(pixels[i], at, c);
        else
          before.run<PARTS & ~KEEP>(pixels[i], at, c);
      }
      Scheme::transform(pixels, 1, columns + j, IN);
    }
    for (int i = 0; i < POINTS; ++i) {
      Vector found[POINTS];
      Scheme::transform(columns + IN * i, 1, found, 1);
      for (int j = 0; j < POINTS; ++j) store(to + (POINTS * i + j) * plane + c, found[j]);
    }
  }
}

template <class Scheme, int PARTS, bool WITHIN>
inline void write_tile(const float* products, int64_t plane, const Pointwise& after, const Shape& shape,
                       const Place& place, float* y) {
  constexpr int POINTS = Scheme::POINTS, OUT = Scheme::OUT;
  const int64_t top = OUT * place.i, left = OUT * place.j, first = place.image * shape.out_height * shape.out_width;
  for (int64_t k = 0; k < shape.out; k += LANES) {
    Vector columns[OUT * POINTS];
    for (int j = 0; j < POINTS; ++j) {
      Vector points[POINTS];
      for (int i = 0; i < POINTS; ++i) points[i] = load(products + (POINTS * i + j) * plane + k);
      Scheme::transform_back(points, 1, columns + j, POINTS);
    }
    for (int i = 0; i < OUT; ++i) {
      if (!WITHIN && top + i >= shape.out_height) break;
      Vector found[OUT];
      Scheme::transform_back(columns + POINTS * i, 1, found, 1);
      for (int j = 0; j < OUT; ++j) {
        if (!WITHIN && left + j >= shape.out_width) break;
        const int64_t pixel = first + (top + i) * shape.out_width + left + j;
        if (WITHIN || shape.stored == shape.out) {
          after.run<PARTS>(found[j], pixel * shape.out + k, k);
          store(y + pixel * shape.out + k, found[j]);
        } else {
          store_some(y + pixel * shape.stored + k, found[j], shape.stored - k);
        }
      }
    }
  }
}

template <class Scheme>
struct Tiles {  // of `count` tiles
  template <int PARTS>
  struct Reading {
    static void made(const float* x, const Pointwise& before, const Shape& shape, Place place, int64_t count, float* to,
                     int64_t to_row, int64_t plane) {
      constexpr int MOVE = Scheme::MOVE, LAST = Scheme::IN - Scheme::BEFORE;
      for (; count > 0; --count, place.next(), to += to_row) {
        const bool begins = Scheme::BEFORE == 0 || (place.i > 0 && place.j > 0);
        const bool within = begins && MOVE * place.i + LAST <= shape.height && MOVE * place.j + LAST <= shape.width;
        (within ? read_tile<Scheme, PARTS, true> : read_tile<Scheme, PARTS, false>)(x, before, shape, place, to, plane);
      }
    }
  };

  template <int PARTS>
  struct Writing {
    static void made(const float* products, int64_t row, int64_t plane, const Pointwise& after, const Shape& shape,
                     Place place, int64_t count, float* y) {
      constexpr int OUT = Scheme::OUT;
      for (; count > 0; --count, place.next(), products += row) {
        const bool within = OUT * (place.i + 1) <= shape.out_height && OUT * (place.j + 1) <= shape.out_width &&
                            shape.stored == shape.out;
        (within ? write_tile<Scheme, PARTS, true> : write_tile<Scheme, PARTS, false>)(products, plane, after, shape,
                                                                                      place, y);
      }
    }
  };
};

// (rows, in) by (in, BLOCKS LANES): rows are a multiple of ROWS.
template <int BLOCKS>
void multiply(const float* left, int64_t left_row, const float* weights, int64_t in, float* to, int64_t to_row,
              int64_t rows) {
  for (int64_t first = 0; first < rows; first += ROWS, left += ROWS * left_row, to += ROWS * to_row) {
    Vector sums[ROWS][BLOCKS] = {};
    for (int64_t c = 0; c < in; ++c) {
      Vector factors[BLOCKS];
      for (int b = 0; b < BLOCKS; ++b) factors[b] = load(weights + (c * BLOCKS + b) * LANES);
      for (int r = 0; r < ROWS; ++r)
        for (int b = 0; b < BLOCKS; ++b) sums[r][b] += left[r * left_row + c] * factors[b];
    }
    for (int r = 0; r < ROWS; ++r)
      for (int b = 0; b < BLOCKS; ++b) store(to + r * to_row + b * LANES, sums[r][b]);
  }
}

int64_t whole_blocks(int64_t tiles) { return (tiles + ROWS - 1) / ROWS * ROWS; }

// (rows, in) by all (in, out) of the weights, which lie in blocks of two registers, or one where out does not fill them.
void multiply_all(const float* left, int64_t left_row, const float* weights, int64_t in, int64_t out, float* to,
                  int64_t to_row, int64_t rows) {
  const bool pairs = out % (2 * LANES) == 0;
  for (int64_t k = 0; k < out; k += pairs ? 2 * LANES : LANES)
    (pairs ? multiply<2> : multiply<1>)(left, left_row, weights + k * in, in, to + k, to_row, rows);
}

// How many of `all` tiles or pixels a thread takes at a time, at least one block, where each takes so many bytes of its
// buffer.
int64_t at_a_time(int64_t all, int64_t each, int64_t weights, int threads) {
  const int64_t most = std::max(BUFFER / each, weights > LARGE ? FEWEST_LARGE : FEWEST);
  return whole_blocks(std::max<int64_t>(1, std::min(most, (all + threads - 1) / threads)));
}

template <class Scheme>
int convolve(const float* x, const float* weights, float* y, const Pointwise& before, const Pointwise& after, Shape shape,
             int threads) {
  constexpr int64_t POINTS = Scheme::POINTS * Scheme::POINTS;
  shape.down = (shape.out_height + Scheme::OUT - 1) / Scheme::OUT;
  shape.across = (shape.out_width + Scheme::OUT - 1) / Scheme::OUT;
  const int64_t in = shape.in, out = shape.out;
  const int64_t in_row = in + PAD, out_row = out + PAD, each = POINTS * (in_row + out_row) * sizeof(float);
  const int64_t all = shape.tiles(), most = at_a_time(all, each, POINTS * in * out * sizeof(float), threads);
  const int64_t parts = (all + most - 1) / most, in_plane = most * in_row, out_plane = most * out_row;
  const auto read = chosen<Tiles<Scheme>::template Reading, is_before>(before.parts());
  const auto write = chosen<Tiles<Scheme>::template Writing, is_after>(after.parts());
  if (!read || !write) return UNKNOWN;
  int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
  {
    const size_t bytes = most * each;
    float* inputs = static_cast<float*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
    float* products = inputs + POINTS * in_plane;
    failed |= inputs == nullptr;
#pragma omp for schedule(dynamic)
    for (int64_t part = 0; part < parts; ++part) {
      if (failed) continue;
      const int64_t first = part * most, count = std::min(most, all - first), rows = whole_blocks(count);
      const Place place(shape.down, shape.across, first);
      read(x, before, shape, place, count, inputs, in_row, in_plane);
      for (int64_t t = count; t < rows; ++t)
        for (int p = 0; p < POINTS; ++p) std::fill_n(inputs + p * in_plane + t * in_row, in, 0.0f);
      for (int p = 0; p < POINTS; ++p)
        multiply_all(inputs + p * in_plane, in_row, weights + p * out * in, in, out, products + p * out_plane, out_row,
                     rows);
      write(products, out_row, out_plane, after, shape, place, count, y);
    }
    std::free(inputs);
  }
  return failed ? NO_MEMORY : 0;
}

template <class Scheme>
void transform_all(const float* weights, float* to, int64_t out, int64_t in, const int64_t* strides, bool flipped,
                   int threads) {
  constexpr int SIDE = Scheme::POINTS, POINTS = SIDE * SIDE;
  const int64_t vectors = (out + LANES - 1) / LANES, block = vectors % 2 == 0 ? 2 : 1;
  const int64_t plane = vectors * LANES * in, chunks = (in + CHUNK - 1) / CHUNK, all = vectors / block * chunks;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t part = 0; part < all; ++part) {
    const int64_t first = part / chunks * block, begin = part % chunks * CHUNK, end = std::min(begin + CHUNK, in);
    Vector found[POINTS][CHUNK * 2];
    for (int64_t at = 0; at < (end - begin) * block; ++at) {
      const int64_t c = begin + at / block, k = (first + at % block) * LANES;
      const float* from = weights + k * strides[0] + c * strides[1];
      Vector kernel[9], rows[3 * SIDE];
      for (int t = 0; t < 9; ++t) {
        const int tap = flipped ? 8 - t : t;
        const float* at_tap = from + tap / 3 * strides[2] + tap % 3 * strides[3];
        if (strides[0] == 1 && k + LANES <= out) {
          kernel[t] = load(at_tap);
          continue;
        }
        alignas(64) float numbers[LANES] = {};
        for (int64_t l = 0; l < std::min<int64_t>(LANES, out - k); ++l) numbers[l] = at_tap[l * strides[0]];
        kernel[t] = load(numbers);
      }
      for (int j = 0; j < 3; ++j) Scheme::transform_weights(kernel + j, 3, rows + j, 3);
      for (int i = 0; i < SIDE; ++i) {
        Vector points[SIDE];
        Scheme::transform_weights(rows + 3 * i, 1, points, 1);
        for (int j = 0; j < SIDE; ++j) found[SIDE * i + j][at] = points[j];
      }
    }
    for (int p = 0; p < POINTS; ++p)
      std::copy_n(reinterpret_cast<const float*>(found[p]), (end - begin) * block * LANES,
                  to + p * plane + (first * in + begin * block) * LANES);
  }
}

// What a convolution by sums reads and writes: the result at place (i, j) of a grid is made of the pixels
// (step i + down[t], step j + across[t]) for each tap t, and goes to pixel (spread i + top, spread j + left).
struct Grid {
  int64_t images, height, width, in;          // of the images read
  int64_t rows, columns, step;                // of the grid
  int64_t out_height, out_width, out, stored;  // of the images written: channels computed, and those that there are
  int64_t spread, top, left;
  int64_t taps;

  int64_t places() const { return images * rows * columns; }
};

void gather(const float* x, const Pointwise& before, const Grid& grid, const int64_t* down, const int64_t* across,
            const Place& place, float* to) {
  const int64_t vectors = grid.in / LANES * LANES;
  for (int64_t t = 0; t < grid.taps; ++t, to += grid.in) {
    const int64_t row = grid.step * place.i + down[t], column = grid.step * place.j + across[t];
    if (row < 0 || row >= grid.height || column < 0 || column >= grid.width) {
      for (int64_t c = 0; c < vectors; c += LANES) store(to + c, Vector{});
      for (int64_t c = vectors; c < grid.in; ++c) to[c] = 0.0f;
      continue;
    }
    const int64_t at = ((place.image * grid.height + row) * grid.width + column) * grid.in;
    if (before.gate)
      for (int64_t c = 0; c < vectors; c += LANES) store(to + c, gated(load(x + at + c), before.gate[(at + c) / LANES]));
    else
      for (int64_t c = 0; c < vectors; c += LANES) store(to + c, load(x + at + c));
    for (int64_t c = vectors; c < grid.in; ++c) to[c] = x[at + c];
  }
}

template <int PARTS>
struct Scattering {  // of `count` places
  static void made(const float* sums, int64_t row_size, const Pointwise& after, const Grid& grid, Place place,
                   int64_t count, float* y) {
    for (; count > 0; --count, place.next(), sums += row_size) {
      const int64_t row = grid.spread * place.i + grid.top, column = grid.spread * place.j + grid.left;
      const int64_t at = ((place.image * grid.out_height + row) * grid.out_width + column) * grid.stored;
      for (int64_t k = 0; k < grid.out; k += LANES) {
        Vector value = load(sums + k);
        if (grid.stored < grid.out) {
          store_some(y + at + k, value, grid.stored - k);
          continue;
        }
        after.run<PARTS>(value, at + k, k);
        store(y + at + k, value);
      }
    }
  }
};

template <int PARTS>
struct Doing {  // to `count` pixels
  static void made(const Pointwise& done, const float* x, float* y, int64_t count, int64_t channels, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t pixel = 0; pixel < count; ++pixel)
      for (int64_t c = 0; c < channels; c += LANES) {
        Vector value = load(x + pixel * channels + c);
        done.run<PARTS>(value, pixel * channels + c, c);
        store(y + pixel * channels + c, value);
      }
  }
};

}  // namespace

extern "C" {

// Numbers in a register: channels must be a multiple of it.
int rf_lanes() { return LANES; }

// y = convolution of x by `weights`, with `in_...` done to x before and `out_...` to the sums after, see Pointwise. `add`
// may be `y` itself. Where fewer channels are stored than computed, nothing is done after.
//
// scheme: 0 is Plain, 1 Strided, 2 Spread. sizes: those of Shape, in its order, without its tiles.
// weights: (points, K / (b LANES), C, b LANES), transformed, where b is 2 if K is a multiple of 2 LANES, else 1.
// Returns 0, NO_MEMORY, or UNKNOWN where no layer needs such parts.
int rf_convolve(const float* x, const float* weights, float* y, const Bits* in_gate, const float* in_scale,
                const float* in_shift, Bits* in_keep, const Bits* out_gate, const float* out_scale,
                const float* out_shift, const float* out_add, Bits* out_keep, const int64_t* sizes, int scheme,
                int in_positive, int out_positive, int threads) {
  const Shape shape{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6], sizes[7], 0, 0};
  const Pointwise before{in_gate, in_scale, in_shift, nullptr, in_positive != 0, in_keep};
  const Pointwise after{out_gate, out_scale, out_shift, out_add, out_positive != 0, out_keep};
  const auto run = scheme == 0 ? convolve<Plain> : scheme == 1 ? convolve<Strided> : convolve<Spread>;
  return run(x, weights, y, before, after, shape, threads);
}

// to = weights (K, C, 3, 3) as rf_convolve takes them, with zeros where K does not fill registers.
//
// strides: from one weight to the next along each axis. flipped: with rows and columns of each kernel in reverse.
// scheme: 0 is Plain, others Strided, which with `flipped` are the weights of Spread.
void rf_transform(const float* weights, float* to, int64_t out, int64_t in, const int64_t* strides, int flipped,
                  int scheme, int threads) {
  const auto run = scheme == 0 ? transform_all<Plain> : transform_all<Strided>;
  run(weights, to, out, in, strides, flipped != 0, threads);
}

// y = convolution of x by `weights` as a sum over taps, at the places of a grid: sizes are those of Grid, in its order.
// Where channels are no multiple of LANES, nothing is done before, or after.
//
// weights: (K / (b LANES), taps C, b LANES), where b is 2 if K is a multiple of 2 LANES, else 1.
// Returns 0, NO_MEMORY, or UNKNOWN where no layer needs such parts.
int rf_sum(const float* x, const float* weights, float* y, const Bits* in_gate, const Bits* out_gate,
           const float* out_scale, const float* out_shift, const float* out_add, Bits* out_keep, const int64_t* sizes,
           const int64_t* down, const int64_t* across, int out_positive, int threads) {
  const Grid grid{sizes[0], sizes[1], sizes[2],  sizes[3],  sizes[4],  sizes[5],  sizes[6], sizes[7],
                  sizes[8], sizes[9], sizes[10], sizes[11], sizes[12], sizes[13], sizes[14]};
  const Pointwise before{in_gate, nullptr, nullptr, nullptr, false, nullptr};
  const Pointwise after{out_gate, out_scale, out_shift, out_add, out_positive != 0, out_keep};
  const int64_t in = grid.taps * grid.in, in_row = in + PAD, out_row = grid.out + PAD, all = grid.places();
  const int64_t each = (in_row + out_row) * sizeof(float);
  const int64_t most = at_a_time(all, each, in * grid.out * sizeof(float), threads), parts = (all + most - 1) / most;
  const auto scatter = chosen<Scattering, is_after>(after.parts());
  if (!scatter) return UNKNOWN;
  int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
  {
    const size_t bytes = most * each;
    float* inputs = static_cast<float*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
    float* sums = inputs + most * in_row;
    failed |= inputs == nullptr;
#pragma omp for schedule(dynamic)
    for (int64_t part = 0; part < parts; ++part) {
      if (failed) continue;
      const int64_t first = part * most, count = std::min(most, all - first), rows = whole_blocks(count);
      Place place(grid.rows, grid.columns, first);
      for (int64_t p = 0; p < count; ++p, place.next()) gather(x, before, grid, down, across, place, inputs + p * in_row);
      for (int64_t p = count; p < rows; ++p) std::fill_n(inputs + p * in_row, in, 0.0f);
      multiply_all(inputs, in_row, weights, in, grid.out, sums, out_row, rows);
      scatter(sums, out_row, after, grid, Place(grid.rows, grid.columns, first), count, y);
    }
    std::free(inputs);
  }
  return failed ? NO_MEMORY : 0;
}

// y = what Pointwise does to x, both (pixels, channels); y may be x.
void rf_pointwise(const float* x, float* y, const Bits* gate, const float* scale, const float* shift, const float* add,
                  Bits* keep, int64_t pixels, int64_t channels, int positive, int threads) {
  const Pointwise done{gate, scale, shift, add, positive != 0, keep};
  chosen<Doing, is_any>(done.parts())(done, x, y, pixels, channels, threads);
}

// y = the images `rows` of point, moved inside a square to a corner of the ball around those of x: clamp(x + eps sign).
// point, x: (N, H, W, C); y: (M, H, W, C); rows, tops, lefts, sides: (M); signs: (M, C).
void rf_squares(const float* point, const float* x, float* y, const int64_t* rows, const int64_t* tops,
                const int64_t* lefts, const int64_t* sides, const float* signs, float eps, int64_t count, int64_t height,
                int64_t width, int64_t channels, int threads) {
  const int64_t size = height * width * channels;
#pragma omp parallel for schedule(static) num_threads(threads) if (count * size > (1 << 16))
  for (int64_t m = 0; m < count; ++m) {
    const float* from = x + rows[m] * size;
    const float* sign = signs + m * channels;
    std::copy_n(point + rows[m] * size, size, y + m * size);
    for (int64_t i = tops[m]; i < tops[m] + sides[m]; ++i)
      for (int64_t j = lefts[m]; j < lefts[m] + sides[m]; ++j)
        for (int64_t c = 0; c < channels; ++c) {
          const int64_t at = (i * width + j) * channels + c;
          y[m * size + at] = std::min(std::max(from[at] + eps * sign[c], 0.0f), 1.0f);
        }
  }
}

}  // extern "C"
