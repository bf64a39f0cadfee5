"use strict";

/** Search, filters and sorting for tables that are complete without it. */
const Tables = (() => {
  function prepare(frame, changed) {
    const rows = [...frame.querySelectorAll("tbody tr")];
    const texts = rows.map((row) => row.textContent.toLowerCase());
    const search = frame.querySelector("input");
    const choices = [...frame.querySelectorAll("select")];
    const count = frame.querySelector("output");

    function filter() {
      const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      rows.forEach((row, i) => {
        const chosen = choices.every((c) => !c.value || row.dataset[c.dataset.filter] === c.value);
        row.hidden = !chosen || !words.every((word) => texts[i].includes(word));
        shown += row.hidden ? 0 : 1;
      });
      count.textContent = `${shown < rows.length ? `${shown} of ` : ""}${rows.length} row${rows.length === 1 ? "" : "s"}`;
    }

    function values() {
      const found = choices.map((c) => [c.dataset.filter, c.value]);
      return Object.fromEntries([...found, ["search", search.value]]);
    }

    function restore(given) {
      search.value = given.search || "";
      for (const choice of choices) choice.value = given[choice.dataset.filter] || "";
      filter();
    }

    for (const field of [search, ...choices]) {
      field.addEventListener("input", () => {
        filter();
        changed(values());
      });
    }
    frame.querySelectorAll("th").forEach((head, i) => makeSortable(head, i, rows));
    return { restore };
  }

  /** A click sorts by this column, a second one the other way; numbers start with the largest. */
  function makeSortable(head, index, rows) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    const key = (row) => {
      const cell = row.cells[index];
      if (cell.dataset.value === undefined) return cell.textContent;
      return cell.dataset.value === "" ? -Infinity : Number(cell.dataset.value);
    };
    button.addEventListener("click", () => {
      const first = head.dataset.first;
      const second = first === "ascending" ? "descending" : "ascending";
      const order = head.getAttribute("aria-sort") === first ? second : first;
      const sign = order === "ascending" ? 1 : -1;
      for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", order);
      const sorted = [...rows].sort((a, b) => sign * compare(key(a), key(b)));
      rows[0].parentNode.append(...sorted);
    });
  }

  function compare(a, b) {
    if (typeof a === "number") return a === b ? 0 : a - b;
    return a.localeCompare(b, undefined, { numeric: true });
  }

  return { prepare };
})();
