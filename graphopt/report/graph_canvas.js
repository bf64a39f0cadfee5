"use strict";

/** Draws one graph into an SVG element, moves and zooms it; only what is in view is in the page. */
class Canvas {
  static SCALES = { least: 0.04, most: 2.5, readable: 0.32, smallestFit: 0.42, largestFit: 1.1 };
  static MARGIN = 24;

  constructor(svg, graph, clicked) {
    Object.assign(this, { svg, graph, x: 0, y: 0, scale: 1, drawn: null, fitted: false });
    this.layer = Canvas.make("g", {});
    svg.replaceChildren(this.layer);
    this.drawing = Layout.arrange(graph, new Set());
    this.places = new Map();
    this.marks = { selected: null, found: new Set(), kin: new Set(), wires: new Map() };
    this.listen(clicked);
    new ResizeObserver(() => (this.fitted ? this.fit() : this.show())).observe(svg);
  }

  static make(name, attributes, text) {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (text !== undefined) element.textContent = text;
    return element;
  }

  /** Lay out anew; `anchor` (an item) keeps its place on the screen. */
  arrange(open, anchor) {
    const before = anchor && this.place(anchor);
    this.drawing = Layout.arrange(this.graph, open);
    this.places = new Map(this.drawing.shapes.map((shape) => [shape.item, shape]));
    const after = anchor && this.place(anchor);
    if (before && after) {
      this.x += (before.x + before.width / 2 - after.x - after.width / 2) * this.scale;
      this.y += (before.y - after.y) * this.scale;
      this.fitted = false;
    }
    this.drawn = null;
    this.show();
  }

  /** The shape of an item, or of the innermost box around it that is visible. */
  place(item) {
    for (let one = item; one; one = one.parent) {
      if (this.places.has(one)) return this.places.get(one);
    }
    return null;
  }

  mark(marks) {
    this.marks = marks;
    this.drawn = null;
    this.show();
  }

  get size() {
    const { width, height } = this.svg.getBoundingClientRect();
    return [width, height];
  }

  /** The whole width in view where that stays readable, else as much as fits around the first item. */
  fit() {
    const [width] = this.size;
    if (!width || !this.drawing.width) return;
    const wanted = (width - 2 * Canvas.MARGIN) / this.drawing.width;
    this.scale = Math.min(Math.max(wanted, Canvas.SCALES.smallestFit), Canvas.SCALES.largestFit);
    const drawn = this.drawing.width * this.scale;
    const first = this.drawing.shapes.find((shape) => shape.item.parent);
    const room = width - 2 * Canvas.MARGIN - drawn;
    const centred = first ? width / 2 - (first.x + first.width / 2) * this.scale : 0;
    this.x = room >= -1 ? (width - drawn) / 2 : Math.min(Math.max(centred, room + Canvas.MARGIN), Canvas.MARGIN);
    this.y = Canvas.MARGIN;
    this.fitted = true;
    this.show();
  }

  zoom(factor, px, py) {
    const [width, height] = this.size;
    const [cx, cy] = [px ?? width / 2, py ?? height / 2];
    const scale = Math.min(Math.max(this.scale * factor, Canvas.SCALES.least), Canvas.SCALES.most);
    this.x = cx - ((cx - this.x) * scale) / this.scale;
    this.y = cy - ((cy - this.y) * scale) / this.scale;
    this.scale = scale;
    this.fitted = false;
    this.show();
  }

  pan(dx, dy) {
    this.x += dx;
    this.y += dy;
    this.fitted = false;
    this.show();
  }

  /** Bring an item to the middle, unless it is well in view. */
  reveal(item) {
    const shape = this.place(item);
    const [width, height] = this.size;
    if (!shape || !width) return;
    this.fitted = false;
    if (this.scale < Canvas.SCALES.readable) this.scale = 0.8;
    const left = this.x + shape.x * this.scale;
    const top = this.y + shape.y * this.scale;
    const [w, h] = [shape.width * this.scale, Math.min(shape.height * this.scale, height / 2)];
    if (left < 8 || left + w > width - 8) this.x += width / 2 - (left + w / 2);
    if (top < 40 || top + h > height - 8) this.y += height / 3 - top;
    this.show();
  }

  show() {
    const [width, height] = this.size;
    if (!width) return;
    this.layer.setAttribute("transform", `translate(${this.x} ${this.y}) scale(${this.scale})`);
    const view = { x: -this.x / this.scale, y: -this.y / this.scale, width: width / this.scale, height: height / this.scale };
    const readable = this.scale >= Canvas.SCALES.readable;
    const drawn = this.drawn;
    if (drawn && drawn.readable === readable && Canvas.contains(drawn.area, view)) return;
    this.draw(Canvas.grown(view), readable);
  }

  draw(area, readable) {
    this.drawn = { area, readable };
    const near = (shape) => Canvas.overlaps(shape, area);
    const opened = this.drawing.shapes.filter((shape) => shape.isOpen && near(shape));
    const closed = this.drawing.shapes.filter((shape) => !shape.isOpen && near(shape));
    const wires = this.drawing.wires.filter(near);
    const lit = wires.filter((wire) => this.marks.wires.has(wire.key));
    this.layer.replaceChildren(
      ...opened.map((shape) => Shapes.open(shape, this.marks, readable)),
      ...wires.map((wire) => Shapes.wire(wire, "wire", readable)),
      ...lit.map((wire) => Shapes.wire(wire, `wire ${this.marks.wires.get(wire.key)}`, readable)),
      ...closed.map((shape) => Shapes.closed(shape, this.marks, readable)),
    );
  }

  static grown({ x, y, width, height }) {
    return { x: x - width / 2, y: y - height / 2, width: width * 2, height: height * 2 };
  }

  static overlaps(a, b) {
    return a.x <= b.x + b.width && b.x <= a.x + a.width && a.y <= b.y + b.height && b.y <= a.y + a.height;
  }

  static contains(outer, inner) {
    return outer.x <= inner.x && outer.y <= inner.y
      && outer.x + outer.width >= inner.x + inner.width && outer.y + outer.height >= inner.y + inner.height;
  }

  /** The item under the pointer: the innermost shape. */
  itemAt(event) {
    const box = this.svg.getBoundingClientRect();
    const x = (event.clientX - box.left - this.x) / this.scale;
    const y = (event.clientY - box.top - this.y) / this.scale;
    const hit = ({ x: left, y: top, width, height }) => x >= left && x <= left + width && y >= top && y <= top + height;
    const shape = this.drawing.shapes.findLast(hit);
    if (!shape || !shape.item.parent && shape.item.isBox) return null;
    return shape.isOpen && y > shape.y + 28 ? null : shape.item;
  }

  listen(clicked) {
    const svg = this.svg;
    let from = null;
    svg.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      from = { x: event.clientX, y: event.clientY, moved: false };
      svg.setPointerCapture(event.pointerId);
    });
    svg.addEventListener("pointermove", (event) => {
      if (!from) return;
      const [dx, dy] = [event.clientX - from.x, event.clientY - from.y];
      if (!from.moved && Math.hypot(dx, dy) < 4) return;
      from = { x: event.clientX, y: event.clientY, moved: true };
      this.pan(dx, dy);
    });
    svg.addEventListener("pointerup", (event) => {
      if (from && !from.moved) clicked(this.itemAt(event));
      from = null;
    });
    svg.addEventListener("wheel", (event) => this.wheel(event), { passive: false });
    svg.addEventListener("keydown", (event) => this.key(event));
  }

  wheel(event) {
    event.preventDefault();
    const unit = event.deltaMode === 1 ? 16 : 1;
    if (event.ctrlKey || event.metaKey) {
      const box = this.svg.getBoundingClientRect();
      this.zoom(Math.exp(-event.deltaY * unit * 0.004), event.clientX - box.left, event.clientY - box.top);
    } else if (event.shiftKey && !event.deltaX) {
      this.pan(-event.deltaY * unit, 0);
    } else {
      this.pan(-event.deltaX * unit, -event.deltaY * unit);
    }
  }

  key(event) {
    const moves = { ArrowLeft: [60, 0], ArrowRight: [-60, 0], ArrowUp: [0, 60], ArrowDown: [0, -60] };
    if (moves[event.key]) this.pan(...moves[event.key]);
    else if (event.key === "+" || event.key === "=") this.zoom(1.25);
    else if (event.key === "-") this.zoom(0.8);
    else if (event.key === "0") this.fit();
    else return;
    event.preventDefault();
  }
}

/** SVG of single shapes and wires. */
const Shapes = (() => {
  const make = Canvas.make;
  const SIGNS = { removed: "−", added: "+", altered: "~" };

  function classes(item, marks, kind) {
    const names = [kind];
    if (!item.isBox) names.push(item.change);
    if (item === marks.selected) names.push("selected");
    if (marks.found.has(item)) names.push("found");
    if (marks.kin.has(item)) names.push("kin");
    return names.join(" ");
  }

  function open(shape, marks, readable) {
    const { item, x, y, width, height } = shape;
    if (!item.parent) return make("g", {});
    const group = make("g", { class: classes(item, marks, "open"), transform: `translate(${x} ${y})` });
    group.append(make("rect", { class: "frame", width, height, rx: 8 }));
    if (readable) {
      group.append(make("path", { class: "fold", d: "M9 12l4 5l4 -5" }), make("text", { x: 23, y: 18, class: "title" }, Labels.of(item).title));
    }
    return group;
  }

  function closed(shape, marks, readable) {
    const { item, x, y, width, height } = shape;
    const group = make("g", { class: classes(item, marks, item.isBox ? "box" : "node"), transform: `translate(${x} ${y})` });
    if (item.kind === "repeat") {
      for (const shift of [6, 3]) group.append(make("rect", { class: "frame", x: shift, y: shift, width, height, rx: 8 }));
    }
    group.append(make("rect", { class: "frame", width, height, rx: item.isBox ? 8 : 4 }));
    if (item.change && item.change !== "same") group.append(make("rect", { class: "mark", width: 4, height, rx: 2 }));
    if (!readable) return group;
    const { title, name, line } = Labels.of(item);
    const first = make("text", { x: 11, y: 17, class: "title" }, title);
    if (name) first.append(make("tspan", {}, name));
    group.append(first, make("text", { x: 11, y: 32, class: "line" }, line));
    const counts = item.isBox ? Object.entries(item.changed) : [[item.change, ""]];
    group.append(...badges(counts, width));
    return group;
  }

  /** What became of a node, or of how many nodes inside a box. */
  function badges(counts, width) {
    let right = width - 8;
    return counts.filter(([change]) => SIGNS[change]).map(([change, count]) => {
      const text = `${SIGNS[change]}${count}`;
      const element = make("text", { x: right, y: 17, class: `badge ${change}`, "text-anchor": "end" }, text);
      right -= Layout.textWidth(text, Labels.TITLE) + 8;
      return element;
    });
  }

  function wire({ d, arrow, tip }, name, readable) {
    if (!arrow || !readable) return make("path", { class: name, d });
    const [x, y] = tip;
    const group = make("g", { class: name });
    group.append(make("path", { d }), make("path", { class: "tip", d: `M${x} ${y}l-3.5 -6h7z` }));
    return group;
  }

  return { open, closed, wire };
})();
