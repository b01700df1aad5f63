"use strict";
// Errors along the graph on a logarithmic scale. Each curve has its own dashes, so that none hangs on colour.
(() => {
  const host = document.getElementById("curve");
  if (!host) return;
  // what differs from one operation to the next is dots, round or square; what grows along the graph is a line
  const SERIES = [
    ["introduced", "", "made at this operation", "round"],
    ["total", "7 3", "accumulated up to it", ""],
    ["exact", "2 3", "in exact arithmetic", "square"],
    ["floor", "1 4", "rounding of before itself", ""],
  ];
  const [H, LEFT, RIGHT, TOP, BOTTOM] = [330, 56, 16, 22, 34];
  let W = 1200;
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
      const point = found.get(key) || { label: key, target: region.after, verdict: "" };
      if (DATA.verdicts.indexOf(region.verdict) > DATA.verdicts.indexOf(point.verdict)) point.verdict = region.verdict;
      for (const [name] of SERIES) {
        if (name === "introduced" && larger(region[name], point[name]) !== point[name]) point.target = region.after;
        point[name] = larger(region[name], point[name]);
      }
      found.set(key, point);
    }
    return [...found.values()];
  }

  function scale() {
    let least = Infinity, most = 0;
    for (const p of points) for (const name of shown) {
      if (p[name] > 0 && Number.isFinite(p[name])) { least = Math.min(least, p[name]); most = Math.max(most, p[name]); }
    }
    const low = most ? Math.floor(Math.log10(Math.max(least, 1e-20))) : -8;
    const high = most ? Math.max(Math.ceil(Math.log10(most)), low + 1) : 0;
    const zero = H - BOTTOM, bottom = zero - 16;
    const x = (index) => LEFT + (W - LEFT - RIGHT) * (points.length > 1 ? index / (points.length - 1) : 0.5);
    const y = (value) => {
      if (value === 0) return zero;
      if (!Number.isFinite(value)) return TOP;
      return bottom - (bottom - TOP) * (Math.log10(Math.max(value, 1e-20)) - low) / (high - low);
    };
    return { x, y, low, high, zero };
  }

  // Zeros have no place on a logarithmic scale: a line passes them by, and of dots there is none.
  function path(name, { x, y }, dots) {
    let text = "", pen = false;
    points.forEach((point, index) => {
      const value = point[name];
      if (value === null || value === undefined || value === 0) return;
      const at = `${x(index).toFixed(1)} ${y(value).toFixed(1)}`;
      text += dots ? `M${at}h0` : `${pen ? "L" : "M"}${at}`;
      pen = true;
    });
    return text;
  }

  function series(name, dashes, dots, s) {
    const line = { fill: "none", stroke: `var(--${name})` };
    if (dots) return make("path", { ...line, d: path(name, s, true), "stroke-width": points.length > 60 ? 3.5 : 6, "stroke-linecap": dots });
    return make("path", { ...line, d: path(name, s, false), "stroke-width": 1.5, "stroke-dasharray": dashes });
  }

  // Name the first place that differs, so that the curve can be read without touching it.
  function flag(s) {
    const index = points.findIndex((p) => DATA.culprits.includes(p.target) || DATA.culprits.includes(p.before) || graver(p));
    if (index < 0) return [];
    const right = s.x(index) < W * 0.6;
    const label = points[index].layer || points[index].label;
    return [make("line", { x1: s.x(index), x2: s.x(index), y1: TOP - 8, y2: s.zero, stroke: "var(--bad)", "stroke-dasharray": "2 4" }),
      make("text", { class: "flag", x: s.x(index) + (right ? 6 : -6), y: TOP - 8, "text-anchor": right ? "start" : "end" }, label)];
  }

  const graver = (p) => Boolean(p.verdict) && !["identical", "rounding"].includes(p.verdict);

  function draw() {
    const step = document.querySelector("input[name=step]:checked").value;
    points = step === "layer" ? byLayer() : REGIONS.map((r) => ({ ...r, label: r.after, target: r.after }));
    W = Math.max(420, host.clientWidth);
    const s = scale();
    const svg = make("svg", { width: W, height: H, viewBox: `0 0 ${W} ${H}` });
    for (let power = s.low; power <= s.high; power += Math.max(1, Math.ceil((s.high - s.low) / 8))) {
      const y = s.y(10 ** power);
      svg.append(make("line", { x1: LEFT, x2: W - RIGHT, y1: y, y2: y, stroke: "var(--line)" }));
      svg.append(make("text", { x: LEFT - 6, y: y + 4, "text-anchor": "end" }, `1e${power}`));
    }
    svg.append(make("line", { x1: LEFT, x2: W - RIGHT, y1: s.zero, y2: s.zero, stroke: "var(--soft)" }));
    svg.append(make("text", { x: LEFT - 6, y: s.zero + 4, "text-anchor": "end" }, "0"));
    let free = 0;
    for (const { label, index } of ticks()) {
      const x = s.x(index), half = label.length * 3.3;
      svg.append(make("line", { x1: x, x2: x, y1: s.zero, y2: s.zero + 5, stroke: "var(--soft)" }));
      const middle = Math.min(Math.max(x, half + 2), W - half - 2);
      if (middle - half < free) continue;
      svg.append(make("text", { x: middle, y: s.zero + 18, "text-anchor": "middle" }, label));
      free = middle + half + 6;
    }
    svg.append(...flag(s));
    for (const [name, dashes, , dots] of SERIES) if (shown.has(name)) svg.append(series(name, dashes, dots, s));
    points.forEach((point, index) => {
      if (!graver(point)) return;
      const worst = Math.min(s.y(point.introduced ?? 0), s.y(point.exact ?? 0));
      svg.append(make("circle", { cx: s.x(index), cy: worst, r: 6, fill: "none", stroke: "var(--bad)", "stroke-width": 2.5 }));
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
    const every = Math.ceil(found.length / Math.max(8, Math.floor(W / 34)));
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

  for (const [name, dashes, meaning, dots] of SERIES) {
    const box = make("input", { type: "checkbox", checked: "", onchange: () => { shown.has(name) ? shown.delete(name) : shown.add(name); draw(); } });
    const sample = make("svg", { viewBox: "0 0 30 10", "aria-hidden": "true" },
      dots ? make("path", { d: "M5 5h0M15 5h0M25 5h0", stroke: `var(--${name})`, "stroke-width": 5, "stroke-linecap": dots })
        : make("path", { d: "M0 5H30", stroke: `var(--${name})`, "stroke-width": 2, "stroke-dasharray": dashes }));
    document.getElementById("series").append(make("label", { class: "key", title: meaning }, box, sample, name));
  }
  for (const radio of document.querySelectorAll("input[name=step]")) radio.addEventListener("change", draw);
  draw();
  let width = host.clientWidth;
  new ResizeObserver(() => { if (host.clientWidth !== width) { width = host.clientWidth; draw(); } }).observe(host);
})();
