"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const TAU = 2 * Math.PI;
  const make = (tag, name, text) => {
    const made = document.createElement(tag);
    if (name) made.className = name;
    if (text !== undefined) made.textContent = text;
    return made;
  };

  // Numbers

  function shown(value) {
    const size = Math.abs(value);
    if (Number.isInteger(value) && size < 1e9) return String(value);
    const short = +value.toPrecision(4);
    return size < 1e-4 || size >= 1e6 ? short.toExponential().replace("e+", "e") : String(short);
  }

  function ticks(low, high, most, whole) {
    let step = Math.pow(10, Math.floor(Math.log10((high - low) / Math.max(1, most))));
    for (const times of [1, 2, 5, 10, 20]) if ((high - low) / (step * times) <= most) { step *= times; break; }
    if (whole) step = Math.max(1, Math.round(step));
    const found = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(+(i * step).toPrecision(12));
    return found;
  }

  function logTicks(low, high, most) {
    const first = Math.floor(Math.log10(low)), last = Math.ceil(Math.log10(high));
    for (const inside of [[1, 2, 3, 5, 7], [1, 2, 5], [1, 3], [1]]) {
      const found = [];
      for (let e = first; e <= last; e++) for (const digit of inside) {
        const at = +`${digit}e${e}`;
        if (at >= low * (1 - 1e-9) && at <= high * (1 + 1e-9)) found.push(at);
      }
      if (found.length <= most && found.length >= 2) return found;
    }
    if (last - first < 2) return ticks(low, high, most, false);
    const every = Math.ceil((last - first) / Math.max(1, most)), found = [];
    for (let e = first; e <= last; e += every) if (+`1e${e}` >= low && +`1e${e}` <= high) found.push(+`1e${e}`);
    return found;
  }

  // What is drawn

  function* pointsOf(mark) {
    if (mark.kind === "lines") {
      for (const [of, xs, ys] of mark.lines) for (let i = 0; i < xs.length; i++) yield { x: xs[i], y: ys[i], of, mark };
      return;
    }
    for (let i = 0; i < mark.x.length; i++) {
      if (mark.y[i] === null) continue;
      const low = mark.low ? mark.low[i] : null, high = mark.high ? mark.high[i] : null;
      yield { x: mark.x[i], y: mark.y[i], low, high, of: mark.of ? mark.of[i] : null, mark };
    }
  }

  // Points in one place lie on each other: among words they are spread to both sides, and many are drawn smaller.

  const count = chart => chart.marks.reduce((sum, mark) => sum + (mark.kind === "points" ? mark.x.length : 0), 0);

  function placeOf(chart, point) {
    if (!chart.x.categories || point.of === null || count(chart) <= 30) return point.x;
    return point.x + ((point.of * 0.618034) % 1 - 0.5) * 0.5;
  }

  function extent(chart, name) {
    const axis = chart[name];
    if (axis.categories) return [-0.5, axis.categories.length - 0.5];
    let low = Infinity, high = -Infinity;
    for (const mark of chart.marks) for (const point of pointsOf(mark)) {
      const values = name === "x" ? [point.x] : [point.y, point.low, point.high];
      for (const value of values) if (value !== null && value !== undefined) {
        low = Math.min(low, value); high = Math.max(high, value);
      }
    }
    if (axis.log) return low === high ? [low / 2, high * 2] : [low / Math.pow(high / low, 0.05), high * Math.pow(high / low, 0.05)];
    if (axis.from !== undefined) low = Math.min(low, axis.from);
    if (axis.to !== undefined) high = Math.max(high, axis.to);
    if (low === high && low === axis.from) return [low, low + 1];
    if (low === high) { const pad = axis.whole ? 1 : Math.abs(low) / 10 || 1; return [low - pad, high + pad]; }
    const pad = (high - low) * (name === "x" ? 0.02 : 0.05);
    return [low === axis.from ? low - pad / 3 : low - pad, high === axis.to ? high + pad / 3 : high + pad];
  }

  function drawMarks(u, chart, hidden) {
    const ctx = u.ctx, ratio = uPlot.pxRatio, edge = 6 * ratio;
    const X = value => u.valToPos(value, "x", true), Y = value => u.valToPos(value, "y", true);
    ctx.save();
    ctx.beginPath();
    ctx.rect(u.bbox.left - edge, u.bbox.top - edge, u.bbox.width + 2 * edge, u.bbox.height + 2 * edge);
    ctx.clip();
    ctx.lineJoin = "round";
    const many = count(chart) > 200;
    const trace = (xs, ys, steps) => {
      ctx.beginPath();
      let open = false;
      for (let i = 0; i < xs.length; i++) {
        if (ys[i] === null) { open = false; continue; }
        if (open && steps) ctx.lineTo(X(xs[i]), Y(ys[i - 1]));
        if (open) ctx.lineTo(X(xs[i]), Y(ys[i])); else ctx.moveTo(X(xs[i]), Y(ys[i]));
        open = true;
      }
      ctx.stroke();
    };
    const dot = (x, y, mark, size) => {
      const at = size * ratio;
      ctx.beginPath();
      if (mark.shape === "cross") {
        ctx.lineWidth = 1.8 * ratio;
        ctx.moveTo(x - at, y - at); ctx.lineTo(x + at, y + at); ctx.moveTo(x - at, y + at); ctx.lineTo(x + at, y - at);
        ctx.stroke();
      } else if (mark.shape === "diamond") {
        const far = at * 1.4;
        ctx.moveTo(x, y - far); ctx.lineTo(x + far, y); ctx.lineTo(x, y + far); ctx.lineTo(x - far, y); ctx.closePath();
        ctx.fill();
      } else { ctx.arc(x, y, at, 0, TAU); ctx.fill(); }
    };
    chart.marks.forEach((mark, index) => {
      if (hidden.has(index)) return;
      ctx.strokeStyle = ctx.fillStyle = mark.color;
      ctx.lineWidth = (mark.width || 2) * ratio;
      ctx.setLineDash((mark.dash || []).map(length => length * ratio));
      ctx.globalAlpha = mark.alpha || 1;
      if (mark.kind === "lines") {
        for (const [, xs, ys] of mark.lines) trace(xs, ys, false);
        ctx.setLineDash([]);
        for (const [, xs, ys] of mark.lines) if (xs.length) dot(X(xs.at(-1)), Y(ys.at(-1)), mark, mark.shape === "cross" ? 3 : 2.5);
      } else if (mark.kind === "points") {
        ctx.setLineDash([]);
        if (many && !mark.low) ctx.globalAlpha = 0.55;
        for (const point of pointsOf(mark)) {
          if (point.low !== null) {
            const x = X(point.x), half = 4 * ratio;
            ctx.lineWidth = 1.5 * ratio;
            ctx.beginPath();
            ctx.moveTo(x, Y(point.low)); ctx.lineTo(x, Y(point.high));
            for (const end of [point.low, point.high]) { ctx.moveTo(x - half, Y(end)); ctx.lineTo(x + half, Y(end)); }
            ctx.stroke();
          }
          dot(X(placeOf(chart, point)), Y(point.y), mark, many && !mark.low ? 2.4 : 3.5);
        }
      } else {
        if (mark.low) {
          ctx.globalAlpha = 0.16;
          ctx.beginPath();
          mark.x.forEach((x, i) => i ? ctx.lineTo(X(x), Y(mark.low[i])) : ctx.moveTo(X(x), Y(mark.low[i])));
          for (let i = mark.x.length - 1; i >= 0; i--) ctx.lineTo(X(mark.x[i]), Y(mark.high[i]));
          ctx.closePath();
          ctx.fill();
          ctx.globalAlpha = mark.alpha || 1;
        }
        trace(mark.x, mark.y, mark.kind === "steps");
        ctx.setLineDash([]);
        if (mark.kind === "line" && mark.x.length <= 60 && !mark.dash) for (const point of pointsOf(mark)) dot(X(point.x), Y(point.y), mark, 2.6);
      }
    });
    ctx.restore();
  }

  // Values under the pointer

  function said(chart, point) {
    const label = chart.x.categories ? chart.x.categories[point.x] : shown(point.x);
    const range = point.low !== null && point.low !== undefined ? ` [${shown(point.low)}, ${shown(point.high)}]` : "";
    return `${chart.x.label} ${label}\n${point.mark.label}: ${shown(point.y)}${range}`;
  }

  function nearest(u, chart, hidden, left, top) {
    let best = null, distance = chart.hover === "x" ? Infinity : 24 * 24;
    chart.marks.forEach((mark, index) => {
      if (hidden.has(index) || mark.kind === "steps" && chart.hover !== "x") return;
      for (const point of pointsOf(mark)) {
        const x = u.valToPos(placeOf(chart, point), "x") - left, y = chart.hover === "x" ? 0 : u.valToPos(point.y, "y") - top;
        if (x * x + y * y < distance) { distance = x * x + y * y; best = point; }
      }
    });
    return best;
  }

  function hover(u, chart, hidden, tip, ring) {
    const { left, top } = u.cursor;
    const point = left >= 0 ? nearest(u, chart, hidden, left, top) : null;
    if (!point) { tip.style.display = ring.style.display = "none"; return; }
    const lines = [];
    if (chart.hover === "x") {
      lines.push(`${chart.x.label} ${shown(point.x)}`);
      chart.marks.forEach((mark, index) => {
        if (hidden.has(index)) return;
        const i = mark.x.indexOf(point.x);
        if (i < 0 || mark.y[i] === null) return;
        lines.push(`${mark.label}: ${shown(mark.y[i])}${mark.low ? ` [${shown(mark.low[i])}, ${shown(mark.high[i])}]` : ""}`);
      });
    } else {
      lines.push(said(chart, point));
      if (point.of !== null && data.names) lines.push(data.names[point.of]);
    }
    tip.textContent = lines.join("\n");
    tip.style.display = "block";
    const x = u.over.offsetLeft + u.valToPos(placeOf(chart, point), "x"), room = u.root.clientWidth;
    const y = u.over.offsetTop + u.valToPos(point.y, "y");
    tip.style.left = `${Math.max(0, Math.min(x + 12, room - tip.offsetWidth))}px`;
    tip.style.top = `${y - tip.offsetHeight - 12 < 0 ? y + 14 : y - tip.offsetHeight - 12}px`;
    ring.style.display = "block";
    ring.style.left = `${x - 6}px`;
    ring.style.top = `${y - 6}px`;
  }

  // A chart

  const fits = (text, room) => { const most = Math.max(3, Math.floor(room / 7)); return text.length <= most ? text : `${text.slice(0, most - 1)}…`; };

  function axisOf(chart, name) {
    const axis = chart[name], isX = name === "x";
    const most = u => Math.max(2, Math.floor((isX ? u.bbox.width / 62 : u.bbox.height / 34) / uPlot.pxRatio));
    const places = (u, _, low, high) => {
      if (axis.categories) {
        const every = Math.ceil(axis.categories.length / Math.max(1, Math.floor(u.bbox.width / uPlot.pxRatio / 28)));
        return axis.categories.map((_, i) => i).filter(i => i % every === 0 && i >= low && i <= high);
      }
      return axis.log ? logTicks(low, high, most(u)) : ticks(low, high, most(u), axis.whole);
    };
    const words = (u, splits) => axis.categories
      ? splits.map(i => fits(axis.categories[i], u.bbox.width / uPlot.pxRatio / Math.max(1, splits.length) - 4))
      : splits.map(shown);
    return {
      scale: name, splits: places, values: words, filter: (_, splits) => splits, label: axis.label,
      labelSize: isX ? 20 : 18, labelGap: 0, size: isX ? 28 : 52, gap: 4,
      font: "12px system-ui, DejaVu Sans, sans-serif", labelFont: "12px system-ui, DejaVu Sans, sans-serif",
      stroke: "#59636e", grid: { stroke: "#e8ebee", width: 1 }, ticks: { stroke: "#c4cbd2", width: 1, size: 4 },
    };
  }

  function swatch(mark) {
    const [w, h] = [22, 12], d = mark.dash ? ` stroke-dasharray="${mark.dash.map(Number).join(" ")}"` : "";
    const line = `<line x1="1" x2="21" y1="6" y2="6" stroke="${mark.color}" stroke-width="${mark.width || 2}"${d}/>`;
    const shapes = {
      cross: `<path d="M7 2l8 8M15 2l-8 8" stroke="${mark.color}" stroke-width="2"/>`,
      diamond: `<path d="M11 1l5 5-5 5-5-5z" fill="${mark.color}"/>`, dot: `<circle cx="11" cy="6" r="4" fill="${mark.color}"/>`,
    };
    const parts = mark.kind === "points" ? shapes[mark.shape || "dot"] : line + (mark.kind === "lines" && mark.shape === "cross" ? shapes.cross : "");
    const held = make("span");
    held.innerHTML = `<svg width="${w}" height="${h}">${parts}</svg>`;
    return held.firstChild;
  }

  function chartIn(figure) {
    const chart = data.charts[+figure.dataset.chart], place = figure.querySelector(".plot"), hidden = new Set();
    const [xs, ys] = [extent(chart, "x"), extent(chart, "y")];
    const scale = (axis, range) => ({ time: false, auto: false, distr: axis.log ? 3 : 1, range: (_, low, high) => low === null || low === high ? range : [Math.max(low, range[0]), Math.min(high, range[1])] });
    const [tip, ring] = [make("div", "tip"), make("div")];
    ring.style.cssText = "position:absolute;width:12px;height:12px;border:2px solid #1d2430;border-radius:50%;pointer-events:none;display:none";
    const wide = figure.classList.contains("wide"), height = () => (place.clientWidth < 500 ? 240 : wide ? 330 : 250);
    const u = new uPlot({
      width: place.clientWidth, height: height(),
      padding: [8, 24, 0, 0],
      scales: { x: { ...scale(chart.x, xs), min: xs[0], max: xs[1] }, y: { ...scale(chart.y, ys), min: ys[0], max: ys[1] } },
      axes: [axisOf(chart, "x"), axisOf(chart, "y")],
      series: [{}, { show: true, stroke: "transparent", points: { show: false } }],
      legend: { show: false },
      cursor: { x: chart.hover === "x", y: false, points: { show: false }, drag: { x: !chart.x.categories, y: false, setScale: true } },
      hooks: { draw: [u => drawMarks(u, chart, hidden)], setCursor: [u => hover(u, chart, hidden, tip, ring)] },
    }, [[xs[0], xs[1]], [ys[0], ys[1]]], place);
    u.root.append(tip, ring);
    const legend = figure.querySelector(".legend");
    chart.marks.forEach((mark, index) => {
      if (!mark.label) return;
      const button = make("button");
      button.type = "button";
      button.append(swatch(mark), make("span", "", mark.label));
      button.onclick = () => {
        if (hidden.has(index)) hidden.delete(index); else hidden.add(index);
        button.classList.toggle("off");
        u.redraw();
      };
      legend.append(button);
    });
    new ResizeObserver(() => { if (place.clientWidth && place.clientWidth !== u.width) u.setSize({ width: place.clientWidth, height: height() }); }).observe(place);
  }

  // Tables that sort

  function sortable(table) {
    const body = table.tBodies[0];
    table.querySelectorAll("th button").forEach(button => {
      const head = button.parentElement, column = head.cellIndex;
      button.onclick = () => {
        const down = head.getAttribute("aria-sort") === "ascending";
        for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const key = row => row.cells[column].textContent;
        const order = (a, b) => {
          const [one, two] = [key(a), key(b)];
          if (one === "" || two === "") return (one === "") - (two === "");
          const [x, y] = [Number(one), Number(two)];
          const found = isNaN(x) || isNaN(y) ? (one < two ? -1 : one > two ? 1 : 0) : x - y;
          return down ? -found : found;
        };
        body.append(...[...body.rows].sort(order));
      };
    });
  }

  // The same problems at several evaluations

  function samplesIn(place) {
    const problems = data.samples, choice = make("select"), shownNow = make("div");
    problems.forEach((problem, i) => {
      const option = make("option", "", `${problem.turn}: ${problem.prompt.replace(/\s+/g, " ").slice(0, 90)}`);
      option.value = i;
      choice.append(option);
    });
    const show = () => {
      const problem = problems[choice.value];
      const table = make("table"), head = table.createTHead().insertRow(), body = table.createTBody();
      for (const name of ["iteration", "result", "reward", "tokens", "answer read", "completion"]) head.append(make("th", "", name));
      for (const each of problem.answers) {
        const row = body.insertRow();
        row.append(make("td", "n", each.iteration), make("td", each.success ? "right" : "wrong", each.success ? "right" : "wrong"));
        row.append(make("td", "n", shown(each.reward)), make("td", "n", each.finish === "length" ? `${each.tokens}, cut off` : each.tokens));
        const [answer, cell] = [make("td", "long"), make("td", "long")];
        answer.append(make("div", "", each.answer === null ? "none" : each.answer));
        cell.append(make("div", "", each.completion));
        row.append(answer, cell);
      }
      const scroll = make("div", "scroll");
      scroll.append(table);
      shownNow.replaceChildren(make("pre", "prompt", problem.prompt), make("p", "note", problem.id), scroll);
    };
    choice.setAttribute("aria-label", "problem");
    choice.onchange = show;
    place.append(choice, shownNow);
    show();
  }

  document.querySelectorAll("table.sortable").forEach(sortable);
  document.querySelectorAll("[data-chart]").forEach(chartIn);
  document.querySelectorAll(".samples").forEach(samplesIn);
  queueMicrotask(() => { document.documentElement.dataset.drawn = Math.round(performance.now()); }); // uPlot draws in one
})();
