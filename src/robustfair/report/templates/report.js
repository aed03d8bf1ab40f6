(function () {
  "use strict";
  var bar = document.querySelector(".order");
  var body = document.querySelector("table.classes tbody");
  if (!bar || !body) return;
  var rows = Array.prototype.slice.call(body.rows);
  var buttons = Array.prototype.slice.call(bar.querySelectorAll("button"));
  function key(row, column) {
    var rate = row.getAttribute("data-rates").split(" ")[column];
    return rate === "none" ? 2 : parseFloat(rate);
  }
  buttons.forEach(function (button) {
    button.addEventListener("click", function () {
      var column = parseInt(button.getAttribute("data-column"), 10);
      var order = rows.slice();
      if (column >= 0) order.sort(function (a, b) { return key(a, column) - key(b, column); });
      order.forEach(function (row) { body.appendChild(row); });
      buttons.forEach(function (other) { other.setAttribute("aria-pressed", String(other === button)); });
    });
  });
  bar.hidden = false;
})();
