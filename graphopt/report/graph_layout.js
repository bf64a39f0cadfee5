"use strict";

/** Places everything that is visible of a graph, given the names of its open boxes. */
const Layout = (() => {
  const NODE_HEIGHT = 40;
  const ROW_GAP = 26;
  const ITEM_GAP = 16;
  const LANE = 6;
  const LANE_GAP = 8;
  const PADDING = 16;
  const HEADER = 28;
  const SWEEPS = 4;
  const LANE_WEIGHT = 0.01;

  const pen = document.createElement("canvas").getContext("2d");
  const widths = new Map();

  function textWidth(text, font) {
    const key = font + text;
    if (!widths.has(key)) {
      pen.font = font;
      widths.set(key, pen.measureText(text).width);
    }
    return widths.get(key);
  }

  /** The visible shapes, outer boxes first, and the wires between them. */
  function arrange(graph, open) {
    const drawing = { shapes: [], wires: [], width: 0, height: 0 };
    if (!graph.root) return drawing;
    const whole = measure(graph.root, open);
    emit(whole, 0, 0, drawing);
    return Object.assign(drawing, { width: whole.width, height: whole.height });
  }

  function measure(item, open) {
    const isOpen = item.isBox && (!item.parent || open.has(item.name));
    return isOpen ? measureOpen(item, open) : measureClosed(item);
  }

  function measureClosed(item) {
    const { title, name, line } = Labels.of(item);
    const marks = item.isBox ? 12 + 34 * Object.keys(item.changed).length : 14 * (item.change !== "same");
    const first = textWidth(title, Labels.TITLE) + textWidth(name, Labels.NAME) + marks;
    const width = Math.max(64, Math.ceil(Math.max(first, textWidth(line, Labels.LINE))) + 22);
    return { item, isOpen: false, width, height: NODE_HEIGHT, top: width / 2, bottom: width / 2 };
  }

  function measureOpen(box, open) {
    const inner = box.items.map((item) => measure(item, open));
    const cells = box.rows.map((row) => row.map((number) => cell(box, inner, number)));
    const segments = allSteps(box);
    place(cells, segments);
    const header = box.parent ? HEADER : 0;
    const label = box.parent ? textWidth(Labels.of(box).title, Labels.TITLE) + 48 : 0;
    const flat = cells.flat();
    const left = Math.min(0, ...flat.map((c) => c.x - c.before));
    const right = Math.max(0, ...flat.map((c) => c.x + c.after));
    const width = Math.max(right - left + 2 * PADDING, label);
    const shift = (width - (right - left)) / 2 - left;
    for (const one of flat) one.x += shift;
    const height = stack(cells, header);
    const edge = (number) => flat.find((c) => c.number === number)?.x ?? width / 2;
    const [top, bottom] = [edge(box.items.length), edge(box.items.length + 1)];
    return { item: box, isOpen: true, width, height, top, bottom, cells, segments };
  }

  /** One place in a row; `x` is where its wires come in, `before` and `after` its extent around. */
  function cell(box, inner, number) {
    const size = inner[number];
    if (!size) {
      const lane = number < 0;
      const gap = lane ? LANE_GAP : 0;
      return { number, lane, before: LANE / 2, after: LANE / 2, gap, height: 0, x: 0 };
    }
    const { top, width, height } = size;
    return { number, size, before: top, after: width - top, gap: ITEM_GAP, height, x: 0 };
  }

  function allSteps(box) {
    const found = new Map();
    for (const [source, target] of box.edges) {
      for (const step of Graph.steps(box, source, target)) found.set(step.key, step);
    }
    return [...found.values()];
  }

  /** Horizontal places: each row moves towards its neighbours above and below, order kept. */
  function place(cells, segments) {
    const at = cells.map((row) => new Map(row.map((c) => [c.number, c])));
    for (const row of cells) row.forEach((c) => Object.assign(c, { above: [], below: [] }));
    for (const { rank, upper, lower } of segments) {
      const [a, b] = [at[rank].get(upper), at[rank + 1].get(lower)];
      a.below.push(b);
      b.above.push(a);
    }
    for (const row of cells) pack(row, (c) => c.x);
    const down = () => cells.forEach((row) => pack(row, (c) => centre(c, c.above, [])));
    const up = () => cells.toReversed().forEach((row) => pack(row, (c) => centre(c, [], c.below)));
    for (let sweep = 0; sweep < SWEEPS; sweep++) {
      down();
      up();
    }
    down();
  }

  /** Where wires would be straight, on average: items follow items and lanes follow lanes. */
  function centre(own, above, below) {
    const wanted = [
      ...above.map((other) => [other, exitX(other)]),
      ...below.map((other) => [other, other.x + own.x - exitX(own)]),
    ];
    const alike = wanted.filter(([other]) => Boolean(other.lane) === Boolean(own.lane));
    const used = alike.length ? alike : wanted;
    return used.length ? used.reduce((sum, [, x]) => sum + x, 0) / used.length : own.x;
  }

  /** Where wires leave at the bottom. */
  const exitX = (one) => (one.size ? one.x - one.before + one.size.bottom : one.x);

  /**
   * The places nearest to the wanted ones, in the least-squares sense, that keep order and gaps:
   * isotonic regression by pooling neighbours that want to pass each other.
   */
  function pack(row, wanted) {
    let offset = 0;
    const offsets = row.map((c, i) => {
      if (i) offset += row[i - 1].after + Math.max(row[i - 1].gap, c.gap) + c.before;
      return offset;
    });
    const pools = [];
    row.forEach((c, i) => {
      let pool = { sum: 0, weight: 0, members: [i] };
      pool.weight = c.lane ? LANE_WEIGHT : 1;
      pool.sum = pool.weight * (wanted(c) - offsets[i]);
      while (pools.length && mean(pools.at(-1)) >= mean(pool)) {
        const last = pools.pop();
        pool = {
          sum: last.sum + pool.sum,
          weight: last.weight + pool.weight,
          members: [...last.members, ...pool.members],
        };
      }
      pools.push(pool);
    });
    for (const pool of pools) {
      for (const i of pool.members) row[i].x = mean(pool) + offsets[i];
    }
  }

  const mean = (pool) => pool.sum / pool.weight;

  /** Vertical places of the rows; returns the height of the box. */
  function stack(cells, header) {
    let y = header;
    cells.forEach((row, i) => {
      const height = Math.max(0, ...row.map((c) => c.height));
      const isEdge = i === 0 || i === cells.length - 1;
      for (const one of row) Object.assign(one, { y, rowHeight: height });
      y += height + (i === cells.length - 1 ? 0 : isEdge && !row.length ? PADDING : ROW_GAP);
    });
    const last = cells.at(-1);
    return last.length ? y : y - ROW_GAP + PADDING;
  }

  /** Adds an item's shape, what is inside and the wires inside, at absolute places. */
  function emit(measured, x, y, drawing) {
    const { item, isOpen, width, height } = measured;
    const shape = { item, isOpen, x, y, width, height };
    drawing.shapes.push(shape);
    if (!isOpen) return;
    emitWires(measured, x, y, drawing);
    for (const one of measured.cells.flat()) {
      if (one.size) emit(one.size, x + one.x - one.before, y + one.y, drawing);
    }
  }

  function emitWires(measured, x, y, drawing) {
    const at = measured.cells.map((row) => new Map(row.map((c) => [c.number, c])));
    const arriving = new Map();
    const wires = measured.segments.map(({ rank, upper, lower, key }) => {
      const [a, b] = [at[rank].get(upper), at[rank + 1].get(lower)];
      const wire = { key, a, b, fromX: exitX(a), arrow: Boolean(b.size) };
      arriving.set(b, [...(arriving.get(b) || []), wire]);
      return wire;
    });
    for (const [target, group] of arriving) spread(target, group);
    for (const wire of wires) drawing.wires.push(path(wire, x, y));
  }

  /** Several wires into one item arrive side by side. */
  function spread(target, group) {
    group.sort((a, b) => a.fromX - b.fromX);
    const room = target.size ? Math.min(14, (2 * Math.min(target.before, target.after)) / (group.length + 1)) : 0;
    group.forEach((wire, i) => {
      wire.toX = target.x + (i - (group.length - 1) / 2) * room;
    });
  }

  function path({ key, a, b, fromX, toX, arrow }, x, y) {
    const [x1, x2] = [x + fromX, x + toX];
    const start = y + a.y;
    const y1 = start + (a.size ? a.height : a.rowHeight);
    const [foot, y2] = [y + a.y + a.rowHeight, y + b.y];
    const bend = (y2 - foot) * 0.55;
    const lead = a.lane || y1 < foot ? `V${foot}` : "";
    const from = a.lane ? start : y1;
    const d = `M${x1} ${from}${lead}C${x1} ${foot + bend} ${x2} ${y2 - bend} ${x2} ${y2}`;
    return { key, d, arrow, x: Math.min(x1, x2), y: from, width: Math.abs(x1 - x2), height: y2 - from, tip: [x2, y2] };
  }

  return { arrange, textWidth };
})();

/** What an item says: a title, a name beside it where that says more, and a line below. */
const Labels = (() => {
  const TITLE = "600 12px system-ui, sans-serif";
  const NAME = "12px system-ui, sans-serif";
  const LINE = "11px ui-monospace, 'DejaVu Sans Mono', monospace";
  const MAX = 44;

  const shortOp = (op) => op.replace(/^aten\.(\w+).*/, "$1");
  const cut = (text) => (text.length > MAX ? `${text.slice(0, MAX - 1)}…` : text);

  function of(item) {
    if (item.isBox) return { title: cut(item.label), name: "", line: `${item.size} nodes${copies(item)}` };
    const op = shortOp(item.op);
    const line = cut([leaf(item), item.shape].filter(Boolean).join("  "));
    if (item.name.replace(/_\d+$/, "") === op) return { title: cut(item.name), name: "", line };
    return { title: cut(op), name: ` ${cut(item.name)}`, line };
  }

  const copies = (box) => (box.kind === "repeat" ? ` in ${box.items.length} equal blocks` : "");

  /** The last part of the module's path, unless the box around already says it. */
  function leaf(node) {
    const name = node.module.split(".").at(-1);
    const around = node.parent ? node.parent.name.replace(/[@/~ ].*$/, "") : "";
    return around === node.module ? "" : name;
  }

  return { of, shortOp, TITLE, NAME, LINE };
})();
