// What a page does once it is open: draws its figures in the reader's colors, keeps their time axes together, draws
// finer where a reader zooms in, sorts tables, and finds requests. All data is in the page.
"use strict";
(() => {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const touched = matchMedia("(pointer: coarse)").matches;
  const DARK = {
    "#1b1f24": "#e4e7eb", "#57606a": "#a3adb8", "#b9c0c8": "#57606a", "#eceff2": "#2a3038", "#ffffff": "#14181d",
  };
  const BUTTONS = [["zoom2d", "pan2d", "resetScale2d", "toImage"]];
  const figures = new Map(); // by id: {plot, json, detail, linked, range}
  let printing = false;

  const unpack = async (text) => {
    const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return JSON.parse(await new Response(stream).text());
  };

  const figureOf = (json) => {
    const replaced = dark.matches && !printing ? json.replace(/#(1b1f24|57606a|b9c0c8|eceff2|ffffff)/g, (c) => DARK[c]) : json;
    return JSON.parse(replaced);
  };

  const draw = (entry) => {
    const figure = figureOf(entry.json);
    if (touched) figure.layout.dragmode = false;
    if (entry.range) [figure.layout.xaxis.range, figure.layout.xaxis.autorange] = [entry.range, false];
    if (entry.changed) entry.changed(figure);
    const options = { responsive: true, displaylogo: false, modeBarButtons: BUTTONS };
    const drawn = Plotly.react(entry.plot, figure.data, figure.layout, options);
    for (const button of entry.plot.querySelectorAll(".modebar-btn")) button.tabIndex = -1;
    return drawn;
  };

  // --- zoom: figures of the same run's time go together, and are drawn as fine as what is seen allows ---

  const visible = (values, kind, from, to, size) => {
    const grouped = [];
    for (let at = from; at < to; at += size) {
      const group = values.slice(at, Math.min(at + size, to));
      const sum = () => group.reduce((a, b) => a + b, 0) / group.length;
      grouped.push(kind === "low" ? Math.min(...group) : kind === "high" ? Math.max(...group) : sum());
    }
    return grouped;
  };

  const refine = (entry, range) => {
    const bins = entry.detail?.bins;
    if (!bins) return;
    const x = [], y = [], places = [];
    for (const { at, kind, begin, width, values } of bins) {
      const from = range ? Math.max(0, Math.floor((range[0] - begin) / width)) : 0;
      const to = range ? Math.min(values.length, Math.ceil((range[1] - begin) / width) + 1) : values.length;
      const size = Math.max(1, Math.ceil((to - from) / entry.detail.groups));
      const of = visible(values, kind, from, to, size);
      places.push(at);
      x.push(of.map((_, number) => begin + (from + number * size) * width));
      y.push(of);
    }
    Plotly.restyle(entry.plot, { x, y }, places);
  };

  const zoom = (entry, range) => {
    entry.range = range;
    refine(entry, range);
    const wanted = range ?? entry.home;
    entry.busy += 1; // what this changes is told like what a reader changes, and would go round for ever
    const change = wanted ? { "xaxis.range": [...wanted] } : { "xaxis.autorange": true };
    Plotly.relayout(entry.plot, change).then(() => (entry.busy -= 1));
  };

  const together = (range, source) => {
    for (const entry of figures.values()) if (entry.linked && entry !== source) zoom(entry, range);
  };

  const follow = (changes, source) => {
    if (source.busy || !source.linked) return;
    const low = changes["xaxis.range[0]"] ?? changes["xaxis.range"]?.[0];
    const high = changes["xaxis.range[1]"] ?? changes["xaxis.range"]?.[1];
    if (low === undefined && !changes["xaxis.autorange"] && !("xaxis.showspikes" in changes)) return;
    source.range = low === undefined ? null : [Number(low), Number(high)];
    refine(source, source.range);
    together(source.range, source);
  };

  const KEYS = { ArrowLeft: [-0.25, 1], ArrowRight: [0.25, 1], "+": [0, 0.5], "=": [0, 0.5], "-": [0, 2], 0: null };
  const press = (event, entry) => {
    if (!(event.key in KEYS) || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    const axis = entry.plot._fullLayout.xaxis;
    if (KEYS[event.key] === null) return entry.linked ? together(null) : zoom(entry, null);
    const [step, factor] = KEYS[event.key];
    const [low, high] = axis.range;
    const middle = (low + high) / 2 + step * (high - low);
    const half = ((high - low) / 2) * factor;
    Plotly.relayout(entry.plot, { "xaxis.range": [middle - half, middle + half] });
  };

  const begin = async (script) => {
    const plot = document.getElementById(script.dataset.plot);
    const packed = document.querySelector(`script[data-detail="${script.dataset.plot}"]`);
    const entry = { plot, json: script.textContent, linked: "linked" in script.dataset, busy: 0 };
    entry.home = JSON.parse(entry.json).layout.xaxis?.range;
    figures.set(plot.id, entry);
    await draw(entry);
    plot.on("plotly_relayout", (changes) => follow(changes, entry));
    plot.addEventListener("keydown", (event) => press(event, entry));
    if (packed) entry.detail = await unpack(packed.textContent);
  };

  const redraw = () => {
    for (const entry of figures.values()) draw(entry).then(() => entry.range && refine(entry, entry.range));
  };
  dark.addEventListener("change", redraw);
  const forPrint = (is) => () => {
    printing = is;
    if (dark.matches) redraw();
  };
  addEventListener("beforeprint", forPrint(true));
  addEventListener("afterprint", forPrint(false));

  // --- tables that sort: a click on a head, or Enter ---

  const worth = (cell) => {
    const text = cell.dataset.value ?? cell.textContent.replace(/,/g, "");
    const value = Number.parseFloat(text);
    return Number.isNaN(value) ? text : value;
  };
  const order = (a, b) => (typeof a === typeof b ? (a < b ? -1 : a > b ? 1 : 0) : typeof a === "number" ? -1 : 1);

  const mark = (heads, chosen, rising) => {
    for (const head of heads) head.removeAttribute("aria-sort");
    chosen.setAttribute("aria-sort", rising ? "ascending" : "descending");
  };

  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      head.firstElementChild?.addEventListener("click", () => {
        const rising = head.getAttribute("aria-sort") !== "ascending";
        const body = table.tBodies[0];
        const rows = [...body.rows].map((row) => [worth(row.cells[column]), row]);
        rows.sort(([a], [b]) => (rising ? order(a, b) : order(b, a)));
        body.append(...rows.map(([, row]) => row));
        mark(heads, head, rising);
      });
    });
  }

  // --- requests: all of them, by id, filtered and sorted; the one that is chosen is drawn among its neighbours ---

  const SHOWN = 20;
  const UNITS = { us: (value) => (value / 1000).toLocaleString("en", { minimumFractionDigits: 3, maximumFractionDigits: 3 }), "": (value) => value.toLocaleString("en"), id: String, text: String };
  const TERM = /^(\w+)\s*(<=|>=|<|>|=)\s*(\S+)$/;
  const HOLDS = { "<": (a, b) => a < b, ">": (a, b) => a > b, "<=": (a, b) => a <= b, ">=": (a, b) => a >= b, "=": (a, b) => a === b };

  const conditions = (text, columns) =>
    text.split(/\s*(?:,|\band\b)\s*/).filter(Boolean).map((part) => {
      if (/^\d+$/.test(part)) return (at) => columns.id.values[at] === Number(part);
      const found = TERM.exec(part);
      const column = found && columns[found[1].toLowerCase()];
      if (!column) throw new Error(`“${part}” is not understood: expected a number of a request, or such as ttft > 1000, preemptions >= 1`);
      const wanted = column.unit === "text" ? found[3] : Number(found[3]) * (column.unit === "us" ? 1000 : 1);
      if (Number.isNaN(wanted)) throw new Error(`“${found[3]}” is no number`);
      return (at) => column.values[at] !== null && HOLDS[found[2]](column.values[at], wanted);
    });

  const finder = async (form) => {
    const { runs } = await unpack(form.querySelector("script").textContent);
    const [table, said] = [form.querySelector("table"), form.querySelector("output")];
    const [which, filter] = [form.elements.run, form.elements.filter];
    let sorted = { name: "ttft", rising: false };
    const columnsOf = () => runs[which ? Number(which.value) : 0].columns;

    const show = () => {
      const columns = columnsOf();
      let chosen = [...columns.id.values.keys()];
      try {
        for (const holds of conditions(filter.value.trim(), columns)) chosen = chosen.filter(holds);
      } catch (error) {
        said.textContent = error.message;
        return;
      }
      const by = columns[sorted.name].values;
      chosen.sort((a, b) => (by[a] === null ? 1 : by[b] === null ? -1 : (sorted.rising ? 1 : -1) * order(by[a], by[b])));
      said.textContent = `${chosen.length.toLocaleString("en")} of ${columns.id.values.length.toLocaleString("en")} requests` +
        (chosen.length > SHOWN ? `, the first ${SHOWN} shown` : "");
      table.tBodies[0].replaceChildren(...chosen.slice(0, SHOWN).map((at) => {
        const row = document.createElement("tr");
        for (const head of table.tHead.rows[0].cells) {
          const { unit, values } = columns[head.dataset.column] ?? { unit: "text", values: [] };
          const cell = row.insertCell();
          cell.dataset.column = head.dataset.column;
          cell.textContent = values[at] === undefined || values[at] === null ? "–" : UNITS[unit](values[at]);
          if (unit === "id") {
            const button = Object.assign(document.createElement("button"), { type: "button", textContent: cell.textContent });
            button.addEventListener("click", () => pin(runs, which ? Number(which.value) : 0, at));
            cell.replaceChildren(button);
          }
        }
        return row;
      }));
    };

    for (const head of table.tHead.rows[0].cells) {
      head.firstElementChild.addEventListener("click", () => {
        sorted = { name: head.dataset.column, rising: sorted.name === head.dataset.column ? !sorted.rising : true };
        mark(table.tHead.rows[0].cells, head, sorted.rising);
        show();
      });
    }
    mark(table.tHead.rows[0].cells, table.querySelector('[data-column="ttft"]'), false);
    form.addEventListener("input", show);
    form.addEventListener("submit", (event) => event.preventDefault());
    show();
  };

  // The bars of the requests that came in around one of them, as the figure of its run's trace has them.
  const pin = (runs, run, at) => {
    const entry = figures.get(`requests-${runs[run].group}`);
    if (!entry) return;
    const id = runs[run].columns.id.values[at];
    entry.changed = (figure) => {
      const first = runs[figure.layout.meta.runs[0]].columns;
      const middle = first.id.values.indexOf(id);
      const most = figure.layout.meta.most;
      const start = Math.max(0, Math.min(middle - (most >> 1), first.id.values.length - most));
      const ids = first.id.values.slice(start, start + most);
      const lanes = figure.layout.meta.runs.length + figure.layout.meta.gap;
      const place = new Map(ids.map((one, number) => [one, number * lanes]));
      figure.layout.yaxis.tickvals = ids.map((one) => place.get(one) + (figure.layout.meta.runs.length - 1) / 2);
      figure.layout.yaxis.ticktext = ids.map((one) => (one === id ? `<b>▸ ${one}</b>` : String(one)));
      let [low, high] = [Infinity, -Infinity];
      for (const trace of figure.data) {
        const { run: of, lane, phase } = trace.meta;
        const { columns, preempted } = runs[of];
        [trace.x, trace.y, trace.customdata] = [[], [], []];
        if (phase === "preempted") {
          for (const [one, time] of preempted) if (place.has(one)) { trace.x.push(time / 1e6); trace.y.push(place.get(one) + lane); }
          continue;
        }
        trace.base = [];
        columns.id.values.forEach((one, row) => {
          if (!place.has(one)) return;
          const arrival = columns.arrival.values[row];
          const [wait, ttft, e2e] = ["wait", "ttft", "e2e"].map((name) => columns[name].values[row]);
          const [from, to] = { queued: [0, wait ?? e2e], prefill: [wait, ttft ?? e2e], decode: [ttft, e2e] }[phase];
          if (from === null || to === null) return;
          trace.base.push((arrival + from) / 1e6);
          trace.x.push((to - from) / 1e6);
          trace.y.push(place.get(one) + lane);
          trace.customdata.push(`request ${one}: ${columns.prompt.values[row].toLocaleString("en")} prompt tokens, ${columns.output.values[row].toLocaleString("en")} output tokens${columns.why?.values[row] ? `<br>waited for ${columns.why.values[row]}` : ""}`);
          low = Math.min(low, (arrival + from) / 1e6);
          high = Math.max(high, (arrival + to) / 1e6);
        });
      }
      const margin = (high - low) * 0.01;
      entry.home = [low - margin, high + margin];
      figure.layout.xaxis.range = entry.home;
    };
    entry.range = null;
    draw(entry);
    entry.plot.scrollIntoView({ block: "center" });
  };

  const start = async () => {
    await Promise.all([...document.querySelectorAll("script[data-plot]")].map(begin));
    await Promise.all([...document.querySelectorAll("form.finder")].map(finder));
    document.documentElement.dataset.ready = "yes";
  };
  start();
})();
