"use strict";
(() => {
  const $ = (selector, within = document) => within.querySelector(selector);
  const $$ = (selector, within = document) => [...within.querySelectorAll(selector)];
  const data = JSON.parse($("#data").textContent);
  const root = document.documentElement;

  // Elements are made, never parsed: a name cannot become markup.
  const make = (tag, attributes = {}, ...children) => {
    const svg = ["svg", "rect", "text"].includes(tag);
    const made = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...children);
    return made;
  };

  // Names break behind their dots rather than anywhere.
  const name = text => make("span", {}, ...String(text).split(/(?<=[._\/])/).flatMap(part => [part, make("wbr")]));

  // --- findings ---------------------------------------------------------------------------------

  const findings = $$(".finding");
  const chips = $$("button[data-severity]");
  function filterFindings() {
    const on = new Set(chips.filter(c => c.ariaPressed === "true").map(c => c.dataset.severity));
    const rule = $("#by-rule")?.value, input = $("#by-input")?.value;
    const words = ($("#by-text")?.value ?? "").toLowerCase();
    let shown = 0;
    for (const f of findings) {
      const fits = on.has(f.dataset.severity) && (!rule || f.dataset.rule === rule)
        && (!input || f.dataset.input === input) && f.textContent.toLowerCase().includes(words);
      f.hidden = !fits;
      shown += fits;
    }
    const status = $("#found");
    if (status) status.textContent = shown === findings.length ? "" : `${shown} of ${findings.length}`;
  }
  for (const chip of chips) chip.addEventListener("click", () => {
    chip.ariaPressed = String(chip.ariaPressed !== "true");
    filterFindings();
  });
  for (const id of ["#by-rule", "#by-input", "#by-text"]) $(id)?.addEventListener("input", filterFindings);

  // --- tables -----------------------------------------------------------------------------------

  const PAGE = 50;
  const rowsByName = new Map();
  const missing = value => value === null || value === undefined || value === "";
  const number = value => typeof value === "number" ? value
    : { NaN: NaN, Infinity: Infinity, "-Infinity": -Infinity }[value];
  function written(value, form) {
    if (missing(value)) return "–";
    if (typeof value !== "number") return String(value);
    if (form === "%") return value === 0 ? "0" : `${(100 * value).toPrecision(3)}%`;
    if (form === "," || Number.isInteger(value) && Math.abs(value) < 1e15) return value.toLocaleString("en-US");
    const size = Math.abs(value);
    return size >= 1e-3 && size < 1e6 ? String(Number(value.toPrecision(4))) : value.toExponential(2);
  }

  function bars(counts, width, height, ends = []) {
    const top = Math.max(...counts, 1), step = width / counts.length;
    const labels = ends.some(e => !missing(e)) ? 16 : 0;
    const drawn = make("svg", { class: "bars", width, height: height + labels, role: "img", "aria-label": "histogram" });
    counts.forEach((count, i) => {
      const tall = count ? Math.max(1, height * count / top) : 0;
      drawn.append(make("rect", { x: i * step, y: height - tall, width: Math.max(step - 1, 0.5), height: tall }));
    });
    if (labels) {
      drawn.append(make("text", { x: 0, y: height + 13 }, written(ends[0])),
        make("text", { x: width, y: height + 13, "text-anchor": "end" }, written(ends[1])));
    }
    return drawn;
  }

  function compared(a, b, down) {
    if (missing(a) || missing(b)) return missing(a) - missing(b);
    const x = number(a), y = number(b);
    let order;
    if (x !== undefined && y !== undefined) {
      if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y);
      order = x < y ? -1 : x > y ? 1 : 0;
    } else order = String(a).localeCompare(String(b), "en", { numeric: true });
    return down ? -order : order;
  }

  function grid(place, panel, id) {
    const { columns, names, rows } = panel;
    const state = { column: null, down: false, words: "", limit: PAGE };
    const body = make("tbody"), head = make("tr");
    const table = make("table", {}, make("thead", {}, head), body);
    const rest = make("button", { type: "button" });
    rest.addEventListener("click", () => { state.limit *= 4; draw(); });
    columns.forEach((column, i) => {
      const button = make("button", { type: "button" }, column.title);
      const th = make("th", { scope: "col", class: i === 0 ? "name" : column.number ? "" : "text" }, button);
      button.addEventListener("click", () => {
        const again = state.column === i;
        state.down = again ? !state.down : column.number;
        Object.assign(state, { column: i, limit: PAGE });
        $$("th", head).forEach(other => other.removeAttribute("aria-sort"));
        th.setAttribute("aria-sort", state.down ? "descending" : "ascending");
        draw();
      });
      head.append(th);
    });

    function opened(row) {
      const inside = make("td", { colspan: columns.length });
      if (row.bars.length) inside.append(bars(row.bars, Math.min(520, place.clientWidth - 40), 90, row.ends));
      const facts = make("div", { class: "facts" });
      for (const [at, value] of row.more)
        facts.append(make("div", {}, make("span", {}, `${names[at]} `), written(value)));
      inside.append(facts);
      return make("tr", { class: "more" }, inside);
    }

    function line(row) {
      const tr = make("tr");
      tr.open = () => {};
      row.cells.forEach((value, i) => {
        const column = columns[i];
        const td = make("td", { class: i === 0 ? "name" : column.number ? "" : "text" });
        if (i === 0 && (row.more.length || row.bars.length)) {
          const button = make("button", { type: "button", "aria-expanded": "false" }, name(value));
          button.addEventListener("click", () => {
            const open = button.ariaExpanded === "true";
            button.ariaExpanded = String(!open);
            if (open) tr.nextSibling.remove(); else tr.after(opened(row));
          });
          tr.open = () => button.click();
          td.append(button);
        } else td.append(i === 0 ? name(written(value, column.form)) : written(value, column.form));
        tr.append(td);
      });
      return tr;
    }

    function draw() {
      let chosen = state.only ? [state.only] : state.words ? rows.filter(r => r.cells.some(c => String(c).toLowerCase().includes(state.words))) : rows;
      if (state.column !== null)
        chosen = [...chosen].sort((a, b) => compared(a.cells[state.column], b.cells[state.column], state.down));
      body.replaceChildren(...chosen.slice(0, state.limit).map(line));
      rest.hidden = chosen.length <= state.limit;
      rest.textContent = `${(chosen.length - state.limit).toLocaleString("en-US")} more rows`;
      $(`[data-shown="${id}"]`).textContent = chosen.length === rows.length
        ? `${rows.length.toLocaleString("en-US")} rows` : `${chosen.length.toLocaleString("en-US")} of ${rows.length.toLocaleString("en-US")} rows`;
    }
    const search = $(`[data-search="${id}"]`);
    search.addEventListener("input", () => {
      Object.assign(state, { only: null, words: search.value.toLowerCase(), limit: PAGE });
      draw();
    });
    const named = ["tensor", "layer"].includes(columns[0].title) ? [...rows].reverse() : [];
    for (const row of named) rowsByName.set(row.cells[0], () => {
      search.value = row.cells[0];
      Object.assign(state, { only: row, words: search.value.toLowerCase() });
      draw();
      body.firstChild.open();
      (search.offsetParent ? search : table).scrollIntoView({ block: "center" });
    });
    place.append(table, rest);
    draw();
  }
  for (const place of $$("[data-grid]")) grid(place, data.panels[place.dataset.grid], place.dataset.grid);

  // What a finding is about leads to its row.
  for (const subject of $$(".subject")) if (rowsByName.has(subject.textContent)) {
    const to = make("button", { type: "button", class: "to", title: "its row in the table" });
    subject.replaceWith(to);
    to.append(subject);
    to.addEventListener("click", rowsByName.get(subject.textContent));
  }

  // --- pictures ---------------------------------------------------------------------------------

  for (const slider of $$("[data-opacity]")) slider.addEventListener("input", () => {
    for (const image of $$(".above", $(`#gallery-${slider.dataset.opacity}`))) image.style.opacity = slider.value / 100;
  });

  // --- charts -----------------------------------------------------------------------------------

  const colour = name => getComputedStyle(root).getPropertyValue(`--${name}`).trim();
  const themed = spec => JSON.parse(JSON.stringify(spec).replace(/"@@([a-z0-9]+)"/g, (_, name) => JSON.stringify(colour(name))));
  const config = () => ({
    background: "transparent", font: "system-ui, sans-serif",
    view: { stroke: null },
    axis: { labelFontSize: 11, titleFontSize: 12, labelColor: colour("dim"), titleColor: colour("dim"), gridColor: colour("line"), domainColor: colour("line"), tickColor: colour("line"), gridOpacity: 0.6, titleFontWeight: "normal" },
    legend: { ...(innerWidth < 600 ? { orient: "bottom", columns: 1 } : {}), labelFontSize: 11, titleFontSize: 12, labelLimit: 300, labelColor: colour("dim"), titleColor: colour("dim"), titleFontWeight: "normal" },
    header: { labelFontSize: 12, labelColor: colour("fg"), titleColor: colour("dim"), labelAnchor: "start" },
    title: { color: colour("fg") },
  });
  // On a narrow screen small multiples stand below each other, and the rest is as narrow as can be read.
  const views = spec => [spec, spec.spec, ...(spec.vconcat ?? [])].filter(each => each?.width);
  function narrowed(spec, wide, room) {
    if (spec.facet && spec.columns && room < 600) spec.columns = 1;
    const factor = Math.max(200 / wide, room / wide);
    for (const each of views(spec)) each.width = each.width.step ? { step: Math.max(4, each.width.step * factor) } : each.width * factor;
    return spec;
  }

  const drawn = new Map(), drawing = new Set();
  async function chart(place) {
    drawing.add(place);
    drawn.get(place)?.finalize();
    const spec = themed(data.panels[place.dataset.chart].spec);
    spec.config = { ...spec.config, ...config() };
    const tooltip = { disableDefaultStyle: true };
    const draw = () => vegaEmbed(place, spec, { ast: true, actions: false, defaultStyle: false, renderer: "canvas", tooltip });
    let made = await draw();
    const first = views(spec)[0]?.width, wide = typeof first === "number" ? first : first && made.view.width();
    const over = place.scrollWidth - place.clientWidth;
    if (over > 0 && (wide || spec.facet)) {
      narrowed(spec, wide || 1, wide ? wide - over : place.clientWidth);
      made.finalize();
      made = await draw();
    }
    drawn.set(place, made);
    place.style.background = colour("bg"); // stays when a dark page is printed
    place.dataset.ready = "true";
  }
  const seen = new IntersectionObserver(entries => {
    for (const { isIntersecting, target } of entries) if (isIntersecting) {
      seen.unobserve(target);
      chart(target);
    }
  }, { rootMargin: "400px" });
  for (const place of $$("[data-chart]")) seen.observe(place);
  // Those farther down while nothing else is to do: printing does not wait for a chart.
  const idle = self.requestIdleCallback ?? (then => setTimeout(then, 500));
  const next = () => {
    const place = $$("[data-chart]").find(each => !each.dataset.ready && !drawing.has(each));
    if (place) { seen.unobserve(place); chart(place).then(() => idle(next)); }
  };
  idle(next);

  // --- theme, keys ------------------------------------------------------------------------------

  const themes = [["", "◐ auto", "as the system"], ["light", "☼ light", "light"], ["dark", "☾ dark", "dark"]];
  let current = 0;
  function redraw() { for (const place of drawn.keys()) chart(place); }
  $("#theme").addEventListener("click", event => {
    current = (current + 1) % themes.length;
    const [theme, label, said] = themes[current];
    if (theme) root.dataset.theme = theme; else delete root.dataset.theme;
    event.target.textContent = label;
    event.target.ariaLabel = `Colours: ${said}`;
    redraw();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  addEventListener("keydown", event => {
    if (event.key !== "/" || event.target.matches("input, select")) return;
    event.preventDefault();
    $("input[type=search]")?.focus();
  });
})();
