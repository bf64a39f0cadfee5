"use strict";

/**
 * One graph: nodes, the boxes around them, and who reads whom.
 *
 * Items are nodes or boxes. An item's `parent` is the box around it and its `slot` the position
 * there. In the numbers of a level, `items.length` is the top edge of the box and one more the bottom.
 */
class Graph {
  constructor(data, strings) {
    this.nodes = data.nodes.map((row) => Graph.node(row, strings));
    this.boxes = data.boxes.map((row) => ({ ...row, isBox: true, parent: null, slot: 0 }));
    this.root = this.boxes[0] || null;
    for (const box of this.boxes) this.adopt(box);
    this.byName = new Map(this.nodes.map((node) => [node.name, node]));
    this.boxByName = new Map(this.boxes.map((box) => [box.name, box]));
    for (const node of this.nodes) {
      node.inputs = node.inputs.map((i) => this.nodes[i]);
      for (const input of node.inputs) input.users.push(node);
    }
  }

  static node(row, strings) {
    const [name, change, inputs, rules, ...texts] = row;
    const [op, shape, module, source, literals, target, short] = texts.map((i) => strings[i]);
    const rewrittenBy = rules.map((i) => strings[i]);
    const text = [name, op, module, short, target, ...rewrittenBy].join(" ").toLowerCase();
    return {
      name, change, inputs, rewrittenBy, op, shape, module, source, literals, target, short, text,
      users: [], parent: null, slot: 0, isBox: false,
    };
  }

  adopt(box) {
    box.items = box.items.map((i) => (i < 0 ? this.boxes[-1 - i] : this.nodes[i]));
    box.items.forEach((item, slot) => Object.assign(item, { parent: box, slot }));
    box.rank = new Map(box.rows.flatMap((row, rank) => row.map((number) => [number, rank])));
  }

  /** Boxes around an item, the outermost first. */
  static around(item) {
    const boxes = [];
    for (let box = item.parent; box; box = box.parent) boxes.unshift(box);
    return boxes;
  }

  /** Nodes inside an item. */
  static inside(item) {
    return item.isBox ? item.items.flatMap(Graph.inside) : [item];
  }

  /** The item, or the outermost folded box that hides it. */
  static visible(item, open) {
    const hiding = Graph.around(item).find((box) => box.parent && !open.has(box.name));
    return hiding || item;
  }

  /** The steps from row to row that an edge of a level takes, through the lane of its source. */
  static steps(box, source, target) {
    const first = box.rank.get(source);
    const last = box.rank.get(target);
    const steps = [];
    for (let rank = first; rank < last; rank++) {
      const upper = rank === first ? source : -1 - source;
      const lower = rank === last - 1 ? target : -1 - source;
      steps.push({ rank, upper, lower, key: `${box.name}|${rank}|${upper}|${lower}` });
    }
    return steps;
  }

  /** Keys of all steps between two nodes, through every box between them. */
  static route(from, to) {
    const up = [...Graph.around(from), from];
    const down = [...Graph.around(to), to];
    let shared = 0;
    while (up[shared + 1] === down[shared + 1]) shared++;
    const keys = Graph.steps(up[shared], up[shared + 1].slot, down[shared + 1].slot);
    for (const item of up.slice(shared + 2)) {
      keys.push(...Graph.steps(item.parent, item.slot, item.parent.items.length + 1));
    }
    for (const item of down.slice(shared + 2)) {
      keys.push(...Graph.steps(item.parent, item.parent.items.length, item.slot));
    }
    return keys.map((step) => step.key);
  }
}
