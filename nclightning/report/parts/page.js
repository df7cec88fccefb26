"use strict";
(() => {
  const charts = JSON.parse(document.getElementById("data").textContent).charts;
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const hidden = new Set();
  // Plotly reads some tags in names; as entities they are text.
  const plain = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const inked = () => getComputedStyle(document.documentElement);
  const several = document.querySelector(".toggles") !== null;

  const curves = (chart) => chart.curves.map((curve) => ({
    type: "scatter", mode: curve.x.length > 40 ? "lines" : "lines+markers", name: plain(curve.name),
    x: curve.x, y: curve.y, visible: !hidden.has(curve.run),
    line: {color: curve.color, dash: curve.dash, width: 1.8}, marker: {size: 5},
    hovertemplate: "%{y:.4g} at %{x:,}<extra>" + plain(curve.name) + "</extra>",
  }));
  const layout = (chart) => {
    const style = inked(), ink = style.getPropertyValue("--ink").trim(), line = style.getPropertyValue("--line").trim();
    const axis = {gridcolor: line, linecolor: line, zeroline: false, automargin: true};
    return {
      modebar: {bgcolor: "rgba(0,0,0,0)", color: style.getPropertyValue("--faint").trim(), activecolor: ink},
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: {color: ink, size: 12},
      margin: {l: 56, r: 12, t: 34, b: 44}, hovermode: "closest", showlegend: !several,
      legend: {orientation: "h", y: -0.2}, height: 384,
      xaxis: {...axis, title: {text: chart.x}, rangemode: "tozero"},
      yaxis: {...axis, type: chart.log ? "log" : "linear", exponentformat: "power", nticks: 9},
    };
  };
  const draw = () => charts.forEach((chart, i) => Plotly.react(
    document.getElementById("chart-" + i), curves(chart), layout(chart), {responsive: true, displaylogo: false}
  ));
  const boxes = [...document.querySelectorAll("input[data-run]")];
  const follow = () => {
    boxes.forEach((box) => { box.checked ? hidden.delete(+box.dataset.run) : hidden.add(+box.dataset.run); });
    draw();
  };
  boxes.forEach((box) => box.addEventListener("change", follow));
  document.querySelectorAll("button[data-all]").forEach((button) => button.addEventListener("click", () => {
    boxes.forEach((box) => { box.checked = button.dataset.all !== ""; });
    follow();
  }));
  dark.addEventListener("change", draw);
  draw();
  document.body.dataset.drawn = charts.length;
})();
