// Plots the history that the table has: values with their intervals over versions. Dragging zooms, a double click ends that.
"use strict";

const table = document.getElementById("history");
const rows = [...table.tBodies[0].rows].reverse();
const versions = rows.map((row) => row.cells[0].querySelector("a").textContent);
const points = rows.map((row) => row.dataset.points.split(" ").map(Number));
const colours = getComputedStyle(document.documentElement);
const colour = (name) => colours.getPropertyValue(name).trim();
const of = (index) => (index === null ? "" : (versions[index] ?? ""));
const written = (plot, value) => (value === null ? "" : value.toPrecision(3));
const axis = { stroke: colour("--soft"), grid: { stroke: colour("--line") }, ticks: { stroke: colour("--line") } };

const frame = document.createElement("div");
frame.className = "plot";
table.closest(".scroll").before(frame);
const plot = new uPlot(
  {
    width: frame.clientWidth,
    height: 280,
    scales: { x: { time: false } },
    axes: [{ ...axis, space: 70, incrs: [1, 2, 5, 10, 20, 50, 100], values: (_, ticks) => ticks.map(of) }, axis],
    series: [
      { label: "Version", value: (_, index) => of(index) },
      { label: "from", stroke: "transparent", points: { show: false }, value: written },
      { label: "to", stroke: "transparent", points: { show: false }, value: written },
      { label: table.dataset.metric, stroke: colour("--link"), width: 1.5, points: { show: true, size: 5 }, value: written },
    ],
    bands: [{ series: [2, 1], fill: colour("--cold-2") }],
  },
  [versions.map((_, index) => index), ...[1, 2, 0].map((part) => points.map((point) => point[part]))], // the value on top
  frame,
);
plot.ctx.canvas.setAttribute("role", "img");
plot.ctx.canvas.setAttribute("aria-label", `${table.dataset.metric} from ${versions[0]} to ${versions.at(-1)}; the table has the values`);
addEventListener("resize", () => plot.setSize({ width: frame.clientWidth, height: 280 }));
