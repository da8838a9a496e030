"use strict";
const colours = ["#2457c5", "#d2691e", "#1b8a5a", "#8b3fa8", "#b3261e", "#5d6878", "#b8860b", "#008b8b"];

// A card with a title, a note and room for a plot, which it returns. Draw when all cards stand and have their widths.
function plotCard(container, title, note) {
  const card = document.createElement("div"), heading = document.createElement("h3"), text = document.createElement("p");
  const plot = document.createElement("div");
  card.className = "card"; plot.className = "plot"; heading.textContent = title; text.textContent = note;
  card.append(heading, text, plot);
  container.append(card);
  return plot;
}
function drawPlot(plot, traces, layout) {
  const axis = { gridcolor: "#edf0f3", zeroline: false, automargin: true };
  Plotly.newPlot(plot, traces, {
    margin: { l: 52, r: 12, t: 8, b: 36 }, showlegend: traces.length > 1,
    legend: { orientation: "h", y: 1.0, yanchor: "bottom", x: 0, font: { size: 11 }, traceorder: "normal" },
    font: { family: "system-ui, sans-serif", size: 12, color: "#1c2430" }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    ...layout, xaxis: { ...axis, ...layout.xaxis }, yaxis: { ...axis, ...layout.yaxis },
  }, { responsive: true, displaylogo: false, displayModeBar: false });
}

// A table that sorts by a click on a column's header and keeps the rows that hold every word of the search field.
// All text goes in through textContent. Column kinds: number, signed, text (long, opens by a click), word, mark.
function sortedTable({ table, search, count, columns, rows, noun, page = 100 }) {
  const head = table.tHead.rows[0], body = table.tBodies[0];
  const haystack = rows.map(row => row.filter(cell => typeof cell === "string").join("\n").toLowerCase());
  let order = null, shown = page;  // null: as they come

  function matching() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const found = rows.filter((_, i) => words.every(word => haystack[i].includes(word)));
    if (order === null) return found;
    const sign = order.down ? -1 : 1;
    return found.sort((a, b) => {
      const x = a[order.column], y = b[order.column];
      if (x === null || y === null) return (x === null) - (y === null);  // missing values last, either way
      return sign * (typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y)));
    });
  }
  function cellOf(value, column) {
    const cell = document.createElement("td");
    if (column.kind === "text") {
      const inner = document.createElement("div");
      cell.className = "text"; inner.textContent = value;
      cell.append(inner);
      cell.addEventListener("click", () => { if (String(getSelection()) === "") cell.classList.toggle("open"); });
    } else if (typeof value === "number") {
      cell.className = "number" + (column.kind === "signed" && value ? (value > 0 ? " good" : " bad") : "");
      cell.textContent = Number.isInteger(value) ? value : Number(value.toPrecision(4));
    } else {
      cell.textContent = value === null ? "\u2013" : value;
      if (column.kind === "mark") cell.className = { pass: "good", fail: "bad" }[value] ?? "";
      else if (column.kind !== "word") cell.className = "number";
    }
    return cell;
  }
  function draw() {
    const found = matching();
    body.replaceChildren(...found.slice(0, shown).map(row => {
      const line = document.createElement("tr");
      line.append(...row.map((value, i) => cellOf(value, columns[i])));
      return line;
    }));
    for (const div of body.querySelectorAll("td.text div")) if (div.scrollHeight > div.clientHeight + 2) div.classList.add("cut");
    if (found.length > shown) {
      const line = body.insertRow(), cell = line.insertCell(), more = document.createElement("button");
      cell.colSpan = columns.length; more.className = "more"; more.textContent = `Show ${Math.min(page, found.length - shown)} more`;
      more.addEventListener("click", () => { shown += page; draw(); });
      cell.append(more);
    }
    count.textContent = found.length === rows.length ? `${rows.length} ${noun}` : `${found.length} of ${rows.length} ${noun}`;
    [...head.cells].forEach((cell, i) =>
      cell.setAttribute("aria-sort", order === null || i !== order.column ? "none" : order.down ? "descending" : "ascending"));
  }
  if (!rows.length) return;
  columns.forEach((column, i) => {
    const cell = document.createElement("th"), button = document.createElement("button");
    cell.scope = "col"; button.textContent = column.name;
    button.addEventListener("click", () => {
      // numbers start with the largest, words with the first; a second click turns it round
      order = { column: i, down: order !== null && i === order.column ? !order.down : ["number", "signed"].includes(column.kind) };
      shown = page;
      draw();
    });
    cell.append(button);
    head.append(cell);
  });
  search.addEventListener("input", () => { shown = page; draw(); });
  draw();
}
