"use strict";
// Errors along the graph on a logarithmic scale. Each curve has its own dashes, so that none hangs on colour.
(() => {
  const host = document.getElementById("curve");
  if (!host) return;
  const SERIES = [
    ["introduced", "", "made at this operation"],
    ["total", "7 3", "accumulated up to it"],
    ["exact", "2 3", "in exact arithmetic"],
    ["floor", "1 5", "rounding of before itself"],
  ];
  const [W, H, LEFT, RIGHT, TOP, BOTTOM] = [1200, 330, 56, 16, 12, 34];
  const shown = new Set(SERIES.map(([name]) => name));
  const words = document.getElementById("curve-words");
  let points = [], at = -1, cursor = null;

  function larger(a, b) {
    if (a === null || a === undefined) return b;
    if (b === null || b === undefined) return a;
    return Number.isNaN(a) || a > b ? a : b;
  }

  function byLayer() {
    const found = new Map();
    for (const region of REGIONS) {
      const key = region.layer || region.module.split(".").slice(0, 2).join(".") || "(root)";
      const point = found.get(key) || { label: key, target: region.after };
      for (const [name] of SERIES) {
        if (name === "introduced" && larger(region[name], point[name]) !== point[name]) point.target = region.after;
        point[name] = larger(region[name], point[name]);
      }
      found.set(key, point);
    }
    return [...found.values()];
  }

  function scale() {
    const values = points.flatMap((p) => SERIES.map(([name]) => p[name])).filter((v) => v > 0 && Number.isFinite(v));
    const low = values.length ? Math.floor(Math.log10(Math.max(Math.min(...values), 1e-20))) : -8;
    const high = values.length ? Math.max(Math.ceil(Math.log10(Math.max(...values))), low + 1) : 0;
    const zero = H - BOTTOM, bottom = zero - 16;
    const x = (index) => LEFT + (W - LEFT - RIGHT) * (points.length > 1 ? index / (points.length - 1) : 0.5);
    const y = (value) => {
      if (value === 0) return zero;
      if (!Number.isFinite(value)) return TOP;
      return bottom - (bottom - TOP) * (Math.log10(Math.max(value, 1e-20)) - low) / (high - low);
    };
    return { x, y, low, high, zero };
  }

  function path(name, { x, y }) {
    let text = "", pen = false;
    points.forEach((point, index) => {
      const value = point[name];
      if (value === null || value === undefined) { pen = false; return; }
      text += `${pen ? "L" : "M"}${x(index).toFixed(1)} ${y(value).toFixed(1)}`;
      pen = true;
    });
    return text;
  }

  function draw() {
    const step = document.querySelector("input[name=step]:checked").value;
    points = step === "layer" ? byLayer() : REGIONS.map((r) => ({ ...r, label: r.after, target: r.after }));
    const s = scale();
    const svg = make("svg", { viewBox: `0 0 ${W} ${H}`, preserveAspectRatio: "none" });
    for (let power = s.low; power <= s.high; power += Math.max(1, Math.ceil((s.high - s.low) / 8))) {
      const y = s.y(10 ** power);
      svg.append(make("line", { x1: LEFT, x2: W - RIGHT, y1: y, y2: y, stroke: "var(--line)" }));
      svg.append(make("text", { x: LEFT - 6, y: y + 4, "text-anchor": "end" }, `1e${power}`));
    }
    svg.append(make("line", { x1: LEFT, x2: W - RIGHT, y1: s.zero, y2: s.zero, stroke: "var(--soft)" }));
    svg.append(make("text", { x: LEFT - 6, y: s.zero + 4, "text-anchor": "end" }, "0"));
    for (const { label, index } of ticks()) {
      svg.append(make("line", { x1: s.x(index), x2: s.x(index), y1: s.zero, y2: s.zero + 5, stroke: "var(--soft)" }));
      svg.append(make("text", { x: s.x(index), y: s.zero + 18, "text-anchor": "middle" }, label));
    }
    for (const [name, dashes] of SERIES) {
      if (!shown.has(name)) continue;
      svg.append(make("path", { d: path(name, s), fill: "none", stroke: `var(--${name})`, "stroke-width": name === "introduced" ? 2 : 1.5,
        "stroke-dasharray": dashes, "vector-effect": "non-scaling-stroke" }));
    }
    points.forEach((point, index) => {
      if (!point.verdict || ["identical", "rounding"].includes(point.verdict)) return;
      svg.append(make("circle", { cx: s.x(index), cy: s.y(point.introduced ?? 0), r: 5, fill: "var(--bad)" }));
    });
    cursor = make("line", { y1: TOP, y2: s.zero, stroke: "var(--accent)", visibility: "hidden" });
    svg.append(cursor);
    svg.addEventListener("mousemove", (event) => point(indexAt(event, svg), s));
    svg.addEventListener("click", () => open());
    host.replaceChildren(svg);
    host.onkeydown = (event) => key(event, s);
    at = -1;
  }

  function ticks() {
    const found = [];
    let last = null;
    points.forEach((p, index) => {
      const layer = p.layer === undefined ? p.label : p.layer;
      if (layer && layer !== last) found.push({ label: layer.split(".").pop(), index });
      last = layer || last;
    });
    const every = Math.ceil(found.length / 32);
    return found.filter((_, index) => index % every === 0);
  }

  function indexAt(event, svg) {
    const box = svg.getBoundingClientRect();
    const share = ((event.clientX - box.left) / box.width * W - LEFT) / (W - LEFT - RIGHT);
    return Math.min(points.length - 1, Math.max(0, Math.round(share * (points.length - 1))));
  }

  function point(index, s) {
    if (index < 0 || !points.length) return;
    at = index;
    cursor.setAttribute("x1", s.x(index)); cursor.setAttribute("x2", s.x(index)); cursor.setAttribute("visibility", "visible");
    const p = points[index];
    const figures = SERIES.map(([name]) => `${name} ${errorText(p[name])}`).join(", ");
    words.textContent = `${p.label}${p.verdict ? `: ${p.verdict}` : ""}${p.module ? ` in ${p.module}` : ""}: ${figures}`;
  }

  function key(event, s) {
    const moves = { ArrowLeft: -1, ArrowRight: 1, PageUp: -20, PageDown: 20, Home: -Infinity, End: Infinity };
    if (event.key in moves) {
      event.preventDefault();
      point(Math.min(points.length - 1, Math.max(0, at + moves[event.key])), s);
    } else if (event.key === "Enter") open();
  }

  function open() {
    if (at >= 0) choose(points[at].target, "curve");
  }

  for (const [name, dashes, meaning] of SERIES) {
    const box = make("input", { type: "checkbox", checked: "", onchange: () => { shown.has(name) ? shown.delete(name) : shown.add(name); draw(); } });
    const sample = make("svg", { viewBox: "0 0 30 10", "aria-hidden": "true" },
      make("path", { d: "M0 5H30", stroke: `var(--${name})`, "stroke-width": 2, "stroke-dasharray": dashes }));
    document.getElementById("series").append(make("label", { class: "key", title: meaning }, box, sample, name));
  }
  for (const radio of document.querySelectorAll("input[name=step]")) radio.addEventListener("change", draw);
  draw();
})();
