// Draws every figure of a page with plotly, and again when the theme or the width of its column changes.
"use strict";
(() => {
  const NARROW = 520; // pixels of the figure's column, not of the window

  const isObject = (v) => v !== null && typeof v === "object" && !Array.isArray(v);
  const merge = (base, over) => {
    const out = { ...base };
    for (const [key, value] of Object.entries(over)) {
      out[key] = isObject(value) && isObject(out[key]) ? merge(out[key], value) : value;
    }
    return out;
  };

  // The page's own colours, laid over the figure's template: what a figure sets itself still wins.
  const themed = (narrow) => {
    const style = getComputedStyle(document.documentElement);
    const [text, muted, surface] = ["text-base", "text-muted", "background"].map((name) =>
      style.getPropertyValue(`--pst-color-${name}`).trim()
    );
    const clear = "rgba(0,0,0,0)";
    const line = "rgba(128,128,128,0.25)";
    const axis = {
      gridcolor: line, linecolor: muted, zerolinecolor: line, tickcolor: muted,
      title: { font: { color: text } }, tickfont: { color: text, size: narrow ? 11 : 13 },
    };
    return {
      paper_bgcolor: clear, plot_bgcolor: clear,
      font: { color: text, family: getComputedStyle(document.body).fontFamily, size: narrow ? 12 : 14 },
      xaxis: axis, yaxis: axis,
      coloraxis: { colorbar: { tickcolor: muted, outlinewidth: 0 } },
      legend: { bgcolor: clear, font: { color: text } },
      hoverlabel: { bgcolor: surface, bordercolor: muted, font: { color: text } },
    };
  };

  // layout.meta.dark maps a colour that reads well on white to one that reads well on black.
  const recolour = (text, swaps) =>
    Object.entries(swaps || {}).reduce((out, [light, dark]) => out.replaceAll(light, dark), text);

  const draw = async (box) => {
    const plot = box.querySelector(".dm-plot");
    const text = box.querySelector("script").textContent;
    const dark = document.documentElement.dataset.theme === "dark";
    const narrow = plot.clientWidth < NARROW;
    let figure = JSON.parse(text);
    if (dark) figure = JSON.parse(recolour(text, figure.layout.meta?.dark));
    const { data, layout } = figure;
    const template = layout.template || {};
    layout.template = { ...template, layout: merge(template.layout || {}, themed(narrow)) };
    layout.autosize = true;
    layout.uirevision = "kept"; // a change of theme keeps the reader's zoom
    delete layout.width;
    await Plotly.react(plot, data, layout, {
      displaylogo: false, responsive: false,
      modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
    });
    box.classList.add("dm-drawn");
  };

  const attempt = (box) => draw(box).catch((error) => {
    box.classList.add("dm-failed"); // shows the picture or table that readers without JavaScript get
    console.error("figure not drawn:", error);
  });

  const start = async () => {
    const boxes = [...document.querySelectorAll(".dm-figure")];
    await window.MathJax?.startup?.promise; // plotly asks MathJax for TeX in labels
    for (const box of boxes) await attempt(box);
    const widths = new Map(boxes.map((box) => [box, box.clientWidth]));
    const observer = new ResizeObserver((entries) => {
      for (const { target } of entries) {
        if (target.clientWidth === 0 || target.clientWidth === widths.get(target)) continue;
        widths.set(target, target.clientWidth);
        attempt(target);
      }
    });
    boxes.forEach((box) => observer.observe(box));
    new MutationObserver(() => boxes.forEach(attempt)).observe(document.documentElement, {
      attributes: true, attributeFilter: ["data-theme"],
    });
    document.documentElement.classList.add("dm-ready");
  };

  start();
})();
