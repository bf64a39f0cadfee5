"use strict";

/** The graph tab: two canvases that share folding, search and selection. */
class GraphView {
  static SIDES = ["before", "after"];
  static VISIBLE_AT_FIRST = 45;

  constructor(section, data, changed) {
    const find = (id) => section.querySelector(`#${id}`);
    Object.assign(this, { section, changed, find, open: new Set(), search: "", selected: "", side: "both" });
    this.graphs = {};
    this.canvases = {};
    this.details = new Details(find("about"), data, (name) => this.select(name));
    for (const side of GraphView.SIDES) {
      this.graphs[side] = new Graph(data[side], data.strings);
      const svg = section.querySelector(`[data-pane=${side}] svg`);
      this.canvases[side] = new Canvas(svg, this.graphs[side], (item) => this.clicked(item, side));
    }
    this.kin = GraphView.kinship(data.rewrites);
    this.matches = [];
    this.fitted = false;
    this.sides = GraphView.SIDES.filter((side) => this.graphs[side].root);
    this.openAtFirst();
    this.listen();
  }

  /** Every node name with the names that stand or stood in the same rewrites. */
  static kinship(rewrites) {
    const kin = new Map();
    for (const rewrite of rewrites) {
      const names = [...rewrite.removed, ...rewrite.added];
      for (const name of names) kin.set(name, new Set([...(kin.get(name) || []), ...names]));
    }
    return kin;
  }

  /** Unfold towards most changes (without any, towards most nodes) while few things are visible. */
  openAtFirst() {
    const graph = this.graphs[this.sides[0]];
    if (!graph) return;
    let [box, visible] = [graph.root, graph.root.items.length];
    for (;;) {
      const boxes = box.items.filter((item) => item.isBox);
      const weight = (one) => one.size + 1e6 * Object.values(one.changed).reduce((a, b) => a + b, 0);
      const next = boxes.sort((a, b) => weight(b) - weight(a))[0];
      if (!next || visible + next.items.length > GraphView.VISIBLE_AT_FIRST) return;
      this.open.add(next.name);
      [box, visible] = [next, visible + next.items.length];
    }
  }

  listen() {
    const { find } = this;
    for (const button of this.section.querySelectorAll("[data-side]")) {
      button.addEventListener("click", () => this.update({ side: button.dataset.side }));
    }
    find("find").addEventListener("input", () => this.runSearch(find("find").value));
    find("find").addEventListener("keydown", (event) => {
      if (event.key === "Enter") this.step(event.shiftKey ? -1 : 1);
      if (event.key === "Escape") this.runSearch("");
    });
    find("next").addEventListener("click", () => this.step(1));
    find("previous").addEventListener("click", () => this.step(-1));
    find("unfold").addEventListener("click", () => this.fold(this.everyBox()));
    find("refold").addEventListener("click", () => this.fold([]));
    find("zoom-in").addEventListener("click", () => this.each((canvas) => canvas.zoom(1.25)));
    find("zoom-out").addEventListener("click", () => this.each((canvas) => canvas.zoom(0.8)));
    find("fit").addEventListener("click", () => this.each((canvas) => canvas.fit()));
    document.addEventListener("keydown", (event) => {
      const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName);
      if (event.key !== "/" || typing || this.section.hidden) return;
      event.preventDefault();
      find("find").focus();
    });
  }

  each(act) {
    for (const side of this.sides) act(this.canvases[side], this.graphs[side]);
  }

  everyBox() {
    return this.sides.flatMap((side) => this.graphs[side].boxes.map((box) => box.name));
  }

  fold(names) {
    this.open = new Set(names);
    this.redraw();
    this.each((canvas) => canvas.fit());
    this.changed(this.state());
  }

  clicked(item, side) {
    if (!item) return this.select("");
    if (!item.isBox) return this.select(item.name, side);
    if (!this.open.delete(item.name)) this.open.add(item.name);
    this.redraw(item.name);
    this.details.box(item);
    this.changed(this.state());
  }

  /** Change the side shown. */
  update({ side }) {
    this.side = side;
    this.layoutPanes();
    this.each((canvas) => canvas.fit());
    if (this.selected) this.select(this.selected);
    else this.changed(this.state());
  }

  layoutPanes() {
    const only = this.sides.length === 1 ? this.sides[0] : this.side;
    for (const side of GraphView.SIDES) {
      this.section.querySelector(`[data-pane=${side}]`).hidden = !this.sides.includes(side) || (only !== "both" && only !== side);
    }
    for (const button of this.section.querySelectorAll("[data-side]")) {
      button.setAttribute("aria-pressed", String(button.dataset.side === only));
      button.disabled = this.sides.length < 2;
    }
  }

  /** Select a node by name on every side that has it, and show what became of it on the other. */
  select(name, side) {
    this.selected = name;
    this.mark();
    this.each((canvas, graph) => {
      const target = this.counterpart(graph, name);
      if (target) this.unfoldTo(target);
    });
    this.redraw();
    this.each((canvas, graph) => {
      const target = this.counterpart(graph, name);
      if (target) canvas.reveal(target);
    });
    this.describe(name, side);
    this.changed(this.state());
  }

  /** The node of that name in a graph, else one that came of the same rewrite. */
  counterpart(graph, name) {
    const found = graph.byName.get(name);
    if (found) return found.parent ? found : found.users.find((user) => user.parent);
    const kin = [...(this.kin.get(name) || [])].map((other) => graph.byName.get(other));
    return kin.findLast((node) => node && node.parent);
  }

  unfoldTo(item) {
    for (const box of Graph.around(item)) this.open.add(box.name);
  }

  describe(name, side) {
    const sides = side ? [side, ...this.sides] : this.sides;
    const owner = sides.find((one) => this.graphs[one].byName.has(name));
    if (owner) this.details.node(this.graphs[owner].byName.get(name));
    else if (this.search) this.details.matches(this.matches, this.search);
    else if (this.sides.length) this.details.overview();
    else this.details.show(Details.heading("This report holds no graph."));
  }

  runSearch(text) {
    this.search = text.trim();
    const words = this.search.toLowerCase().split(/\s+/).filter(Boolean);
    const hit = (node) => words.length > 0 && words.every((word) => node.text.includes(word));
    const names = this.sides.flatMap((side) => this.graphs[side].nodes.filter(hit).map((node) => node.name));
    this.matches = [...new Set(names)];
    this.find("find").value = text;
    this.selected = "";
    if (this.matches.length) this.select(this.matches[0]);
    else this.mark();
    if (this.matches.length !== 1) this.describe("");
    this.showCount();
    this.changed(this.state());
  }

  step(by) {
    if (!this.matches.length) return;
    const at = this.matches.indexOf(this.selected);
    const next = (at + by + this.matches.length) % this.matches.length;
    this.select(this.matches[next]);
    this.showCount();
  }

  showCount() {
    const at = this.matches.indexOf(this.selected);
    this.find("found").textContent = !this.search ? "" : this.matches.length ? `${at + 1} of ${this.matches.length}` : "none";
  }

  mark() {
    const found = new Set(this.matches);
    this.each((canvas, graph) => {
      const visible = (node) => Graph.visible(node, this.open);
      const selected = graph.byName.get(this.selected);
      const kin = [...(this.kin.get(this.selected) || [])].filter((name) => name !== this.selected);
      const nodes = (names) => names.map((name) => graph.byName.get(name)).filter((node) => node && node.parent);
      canvas.mark({
        selected: selected && selected.parent ? visible(selected) : null,
        found: new Set(nodes([...found]).map(visible)),
        kin: new Set(nodes(kin).map(visible)),
        wires: GraphView.wiresOf(selected),
      });
    });
  }

  /** Wires that lead into a node and out of it. */
  static wiresOf(node) {
    const wires = new Map();
    if (!node || !node.parent) return wires;
    for (const user of node.users) Graph.route(node, user).forEach((key) => wires.set(key, "out"));
    for (const input of node.inputs.filter((one) => one.parent)) {
      Graph.route(input, node).forEach((key) => wires.set(key, "in"));
    }
    return wires;
  }

  redraw(anchor) {
    this.each((canvas, graph) => canvas.arrange(this.open, graph.boxByName.get(anchor)));
    this.mark();
  }

  /**
   * What the address says. Only the deepest open boxes, since opening one opens those around it;
   * `*` for all, `-` for none.
   */
  state() {
    const graphs = this.sides.map((side) => this.graphs[side]);
    const boxes = [...this.open].map((name) => graphs.map((g) => g.boxByName.get(name)).find(Boolean)).filter(Boolean);
    const around = new Set(boxes.flatMap((box) => Graph.around(box)));
    const deepest = boxes.filter((box) => !around.has(box) && box.parent).map((box) => box.name);
    const everything = deepest.length > 40 && this.open.size >= new Set(this.everyBox()).size;
    return { side: this.side, open: everything ? ["*"] : deepest.length ? deepest : ["-"], search: this.search, node: this.selected };
  }

  /** Take a state from the address; what it does not say stays as it is. */
  restore({ side, open, search, node }) {
    if (side && [...GraphView.SIDES, "both"].includes(side)) this.side = side;
    this.layoutPanes();
    if (open) {
      this.open = new Set(open.includes("*") ? this.everyBox() : []);
      this.each((canvas, graph) => {
        for (const box of open.map((name) => graph.boxByName.get(name)).filter(Boolean)) {
          this.unfoldTo(box);
          this.open.add(box.name);
        }
      });
    }
    this.redraw();
    if (!this.fitted) this.each((canvas) => canvas.fit());
    this.fitted = true;
    this.describe("");
    if (search !== undefined) this.runSearch(search);
    if (node) this.select(node);
  }
}
