"use strict";

/** The panel beside the graphs: what was clicked, what was found, or what changed. */
class Details {
  constructor(element, data, choose) {
    Object.assign(this, { element, data, choose });
  }

  static make(name, attributes, ...children) {
    const element = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.append(...children);
    return element;
  }

  show(...children) {
    this.element.replaceChildren(...children);
    this.element.scrollTop = 0;
  }

  link(name) {
    const button = Details.make("button", { type: "button", class: "node" }, name);
    button.addEventListener("click", () => this.choose(name));
    return button;
  }

  links(names, most = 40) {
    const shown = names.slice(0, most).map((name) => this.link(name));
    if (names.length > most) shown.push(`and ${names.length - most} more`);
    return Details.make("div", { class: "links" }, ...shown);
  }

  static pairs(rows) {
    const known = rows.filter(([, value]) => value && (value.nodeType || value.length));
    const cells = known.flatMap(([key, value]) => [Details.make("dt", {}, key), Details.make("dd", {}, value)]);
    return Details.make("dl", {}, ...cells);
  }

  static heading(text, note) {
    const parts = note ? [text, Details.make("small", {}, note)] : [text];
    return Details.make("h3", {}, ...parts);
  }

  node(node) {
    const state = node.inputs.filter((input) => !input.parent);
    const values = node.inputs.filter((input) => input.parent);
    this.show(
      Details.heading(node.name, Details.verb(node.change)),
      Details.pairs([
        ["operator", node.op],
        ["shape", node.shape],
        ["arguments", node.literals],
        ["module", node.module],
        ["tensor", node.target],
        ["source", this.source(node)],
        ["made by", node.rewrittenBy.join(", ")],
        ["reads", values.length ? this.links(values.map((n) => n.name)) : ""],
        ["state", state.length ? Details.state(state) : ""],
        ["read by", node.users.length ? this.links(node.users.map((n) => n.name)) : ""],
      ]),
      ...this.rewrites(node.name),
      ...this.misses(node.name),
    );
  }

  static verb(change) {
    return { removed: "removed by a rewrite", added: "added by a rewrite" }[change] || change;
  }

  /** Text in which names stand in backticks. */
  static prose(text) {
    const parts = text.split("`");
    if (parts.length % 2 === 0) return [text];
    return parts.map((part, i) => (i % 2 ? Details.make("code", {}, part) : part));
  }

  source(node) {
    return node.short ? Details.make("span", { title: node.source }, node.short) : "";
  }

  static state(nodes) {
    const rows = nodes.map((n) => Details.make("div", {}, `${n.target || n.name} `, Details.make("small", {}, n.shape)));
    return Details.make("div", { class: "state" }, ...rows);
  }

  rewrites(name) {
    const own = this.data.rewrites.filter((r) => r.removed.includes(name) || r.added.includes(name));
    return own.map((r) => Details.make("div", { class: "card applied" },
      Details.heading(r.rule, r.pass),
      Details.pairs([
        ["removed", this.links(r.removed)],
        ["added", r.added.length ? this.links(r.added) : "nothing"],
        ["speedup", r.speedup],
        ["proof", r.certificate],
      ])));
  }

  misses(name) {
    const own = this.data.misses.filter((m) => m.node === name);
    const titles = { match: "looked alike", check: "refused", verify: "rolled back", profit: "slower here" };
    return own.map((m) => Details.make("div", { class: "card missed" },
      Details.heading(m.rule, titles[m.stage] || m.stage),
      Details.make("p", {}, ...Details.prose(m.reason)),
      Details.pairs([["allowed by", m.option]])));
  }

  box(box) {
    const nodes = Graph.inside(box);
    const counts = new Map();
    for (const node of nodes) {
      const op = Labels.shortOp(node.op);
      counts.set(op, (counts.get(op) || 0) + 1);
    }
    const sorted = [...counts].sort((a, b) => b[1] - a[1]);
    this.show(
      Details.heading(box.label, box.kind === "repeat" ? `${box.items.length} equal blocks` : box.kind),
      Details.pairs([
        ["name", box.name],
        ["nodes", String(box.size)],
        ...Object.entries(box.changed).map(([change, count]) => [change, String(count)]),
        ["operators", sorted.map(([op, count]) => `${op} ${count}`).join(", ")],
      ]),
    );
  }

  /** Names that a search found. */
  matches(names, text) {
    if (!names.length) {
      this.show(Details.heading("Nothing found"), Details.make("p", {}, `No node matches “${text}”.`));
      return;
    }
    this.show(Details.heading(`${names.length} found`), this.links(names, 200));
  }

  /** What to look at first: the rewrites by rule. */
  overview() {
    const rules = new Map();
    for (const rewrite of this.data.rewrites) {
      rules.set(rewrite.rule, [...(rules.get(rewrite.rule) || []), rewrite]);
    }
    const cards = [...rules].map(([rule, rewrites]) => Details.make("div", { class: "card applied" },
      Details.heading(rule, rewrites.length === 1 ? "once" : `${rewrites.length} times`),
      this.links(rewrites.map((r) => r.removed.at(-1) || r.added.at(-1)))));
    this.show(Details.legend(), ...(cards.length ? cards : [Details.make("p", {}, "Nothing was rewritten.")]));
  }

  static legend() {
    const keys = [["removed", "− removed"], ["added", "+ added"], ["altered", "~ altered"]];
    const marks = keys.map(([name, text]) => Details.make("span", { class: `key ${name}` }, text));
    return Details.make("div", { class: "legend" },
      Details.make("p", {}, ...marks),
      Details.make("p", {}, "Click a box to unfold it, its title to fold it, a node for what is known of it. Drag or scroll to move; Ctrl and scroll to zoom."));
  }
}
