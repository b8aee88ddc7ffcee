// Reads the curves under the pointer: one cursor through all charts, the values in the bar at the top.
(function () {
  "use strict";
  const d = JSON.parse(document.getElementById("data").textContent);
  const charts = Array.from(document.querySelectorAll("svg.chart"));
  const readout = document.getElementById("readout");
  if (!d.tokens.length || !readout) return;
  const units = [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "K"]];
  function tokens(n) {
    for (const [limit, unit] of units) if (n >= limit) return (n / limit).toPrecision(3) + unit;
    return String(Math.round(n));
  }
  function nearest(x) {
    let low = 0, high = d.tokens.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (d.tokens[middle] < x) low = middle + 1; else high = middle;
    }
    return low > 0 && x - d.tokens[low - 1] < d.tokens[low] - x ? low - 1 : low;
  }
  function put(pairs) {
    readout.textContent = "";
    for (const [name, value] of pairs) {
      const b = document.createElement("b");
      b.textContent = value;
      readout.append(name + " ", b, "   ");
    }
  }
  function show(i, moved) {
    const p = d.phases[d.phase[i]];
    put([["", p.name], ["tokens", tokens(d.tokens[i])], ["step", d.step[i] + "/" + p.steps],
      ["loss", d.loss[i] === null ? "-" : d.loss[i].toFixed(4)], ["lr", d.lr[i] === null ? "-" : d.lr[i].toExponential(2)],
      ["tokens/s", d.speed[i] === null ? "-" : tokens(d.speed[i])], ["length", p.length], ["RoPE base", p.rope]]);
    const x = d.left + (d.width - d.left - d.right) * d.tokens[i] / d.total;
    for (const chart of charts) {
      const line = chart.querySelector(".cursor");
      line.setAttribute("x1", x);
      line.setAttribute("x2", x);
      line.style.opacity = moved ? 0.45 : 0;
    }
  }
  const last = d.tokens.length - 1;
  for (const chart of charts) {
    chart.addEventListener("pointermove", function (event) {
      const box = chart.getBoundingClientRect();
      const x = (event.clientX - box.left) / box.width * d.width;
      show(nearest((x - d.left) / (d.width - d.left - d.right) * d.total), true);
    });
    chart.addEventListener("pointerleave", function () { show(last, false); });
  }
  show(last, false);
})();
