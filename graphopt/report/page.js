"use strict";

/**
 * The page: tabs, theme, and an address that says what is shown, such as
 * `#graph&open=encoder.layer.0&search=softmax` or `#missed&rule=FuseAttention`.
 */
const Page = (() => {
  const tabs = [...document.querySelectorAll("[data-tab]")];
  const tables = new Map();
  let graph = null;
  let theme = "";

  /** `#tab&key=value,value` as `{tab, values}`; values are percent-encoded one by one. */
  function readAddress() {
    const [tab, ...pairs] = location.hash.slice(1).split("&");
    const values = {};
    for (const pair of pairs) {
      const [key, ...rest] = pair.split("=");
      values[decode(key)] = rest.join("=").split(",").map(decode);
    }
    return { tab: tabs.some((one) => one.id === tab) ? tab : "overview", values };
  }

  function decode(text) {
    try {
      return decodeURIComponent(text);
    } catch {
      return text;
    }
  }

  function writeAddress(tab, values) {
    const given = Object.entries({ ...values, theme }).map(([key, value]) => [key, [value].flat()]);
    const parts = given.filter(([, list]) => list.some(Boolean)).map(([key, list]) => `${key}=${list.map(encodeURIComponent).join(",")}`);
    history.replaceState(null, "", `#${[tab, ...parts].join("&")}`);
  }

  function show() {
    const { tab, values } = readAddress();
    const first = (key) => values[key]?.[0];
    useTheme(first("theme") ?? theme);
    for (const one of tabs) one.hidden = one.id !== tab;
    for (const link of document.querySelectorAll("nav a")) {
      link.toggleAttribute("aria-current", link.hash === `#${tab}`);
    }
    document.body.dataset.tab = tab;
    if (tab === "graph") {
      graph ??= makeGraph();
      graph.restore({ side: first("side"), open: values.open, search: first("search"), node: first("node") });
    } else {
      const given = Object.fromEntries(Object.entries(values).map(([key, list]) => [key, list.join(",")]));
      for (const table of tables.get(tab) || []) table.restore(given);
    }
  }

  function makeGraph() {
    const data = JSON.parse(document.getElementById("graph-data").textContent);
    const section = document.getElementById("graph");
    return new GraphView(section, data, (state) => writeAddress("graph", { ...state, side: state.side === "both" ? "" : state.side }));
  }

  function useTheme(name) {
    theme = ["light", "dark"].includes(name) ? name : "";
    if (theme) document.documentElement.dataset.theme = theme;
  }

  function switchTheme() {
    const dark = theme ? theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    useTheme(dark ? "light" : "dark");
    const { tab, values } = readAddress();
    writeAddress(tab, values);
  }

  function start() {
    for (const tab of tabs) {
      const frames = [...tab.querySelectorAll(".searchable")];
      tables.set(tab.id, frames.map((frame) => Tables.prepare(frame, (values) => writeAddress(tab.id, values))));
    }
    document.getElementById("theme").addEventListener("click", switchTheme);
    addEventListener("hashchange", show);
    document.documentElement.dataset.script = "on";
    show();
    document.documentElement.dataset.ready = "true";
  }

  return { start };
})();

addEventListener("error", (event) => {
  document.documentElement.dataset.error = event.message;
});
Page.start();
