"use strict";
// Shared by all parts of the page: the data, numbers as text, selection, the colour scheme.
const DATA = JSON.parse(document.getElementById("data").textContent);
const COLUMNS = ["verdict", "before", "after", "op", "module", "layer", "introduced", "total", "exact", "floor",
  "evidence", "sizeBefore", "sizeAfter", "heat", "rule"];
// non-finite numbers come as strings; null means "not measured"
const number = (value) => (typeof value === "string" ? { nan: NaN, inf: Infinity, "-inf": -Infinity }[value] : value);
const REGIONS = DATA.regions.map((row, index) => {
  const region = { index };
  COLUMNS.forEach((name, column) => { region[name] = row[column]; });
  for (const name of ["introduced", "total", "exact", "floor"]) region[name] = number(region[name]);
  return region;
});
const byAfter = new Map(REGIONS.map((region) => [region.after, region]));
const byBefore = new Map(REGIONS.map((region) => [region.before, region]));
const SVG = "http://www.w3.org/2000/svg";

function errorText(value) {
  if (value === null || value === undefined) return "-";
  if (value === 0) return "0";
  return Number.isFinite(value) ? value.toExponential(1).replace(/e([+-])(\d)$/, "e$10$2") : String(value).toLowerCase();
}

function make(tag, attributes = {}, ...children) {
  const svg = ["svg", "g", "path", "rect", "text", "line", "circle", "title"].includes(tag);
  const element = svg ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

// One selection for the whole page: every part listens, any part may choose.
const listeners = [];
function onChoice(listener) { listeners.push(listener); }
function choose(name, from) { for (const listener of listeners) listener(name, from); }

const theme = document.getElementById("theme");
function setTheme(dark) {
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  theme.setAttribute("aria-pressed", String(dark));
  theme.textContent = dark ? "Light" : "Dark";
}
setTheme(window.matchMedia("(prefers-color-scheme: dark)").matches);
theme.addEventListener("click", () => setTheme(document.documentElement.dataset.theme !== "dark"));

for (const link of document.querySelectorAll("[data-go]")) {
  link.addEventListener("click", () => choose(link.dataset.go, "finding"));
}
