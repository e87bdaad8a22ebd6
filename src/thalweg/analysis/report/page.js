// Draws the interactive curves of a report from the JSON beside it. Branches and the way seeds are
// shown are chosen once for all panels; the quantity and the scale, panel by panel.
"use strict";
(() => {
  const study = JSON.parse(document.getElementById("study-data").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  // More branches than can be told apart: those that come first (trunk and roles) are shown at first.
  const MOST_CHIPS = 12, FIRST_SHOWN = 4;
  const many = study.branches.length > MOST_CHIPS;
  const hidden = new Set(many ? study.branches.slice(FIRST_SHOWN) : []);
  const choice = { eachSeed: false, hidden, printing: false };
  const panels = [];

  const element = (tag, className, text) => {
    const made = document.createElement(tag);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  };
  const variable = (name) =>
    getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const colourOf = (style) => (dark.matches && !choice.printing ? style.dark : style.light);
  const seeThrough = (hex, opacity) => {
    const parts = [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
    return `rgba(${parts.join(",")},${opacity})`;
  };

  // A row of buttons of which one is on.
  const switchOf = (label, options, current, choose) => {
    const group = element("div", "switch");
    group.setAttribute("role", "group");
    group.setAttribute("aria-label", label);
    const buttons = options.map((text, index) => {
      const button = element("button", "", text);
      button.type = "button";
      button.setAttribute("aria-pressed", String(index === current));
      button.addEventListener("click", () => {
        buttons.forEach((other, at) => other.setAttribute("aria-pressed", String(at === index)));
        choose(index);
      });
      group.append(button);
      return button;
    });
    return group;
  };

  const bandTraces = (line, style, colour) => {
    const several = Object.keys(line.seeds).length > 1;
    const edge = { x: line.x, mode: "lines", line: { width: 0 }, hoverinfo: "skip" };
    const spread = several ? " [%{customdata[0]:.4~g}, %{customdata[1]:.4~g}]" : "";
    const mean = {
      x: line.x, y: line.mean, name: line.name, mode: "lines",
      line: { color: colour, width: 2, dash: style.dash },
      customdata: line.x.map((_, at) => [line.low[at], line.high[at]]),
      hovertemplate: `<b>%{y:.4~g}</b>${spread}<extra>${line.name}</extra>`,
    };
    if (!several) return [mean];
    return [
      { ...edge, y: line.low },
      { ...edge, y: line.high, fill: "tonexty", fillcolor: seeThrough(colour, 0.16) },
      mean,
    ];
  };

  const seedTraces = (line, style, colour) =>
    Object.entries(line.seeds).map(([seed, values]) => ({
      x: line.x, y: values, name: `${line.name}, seed ${seed}`, mode: "lines",
      line: { color: colour, width: 1.2, dash: style.dash },
      hovertemplate: `<b>%{y:.4~g}</b><extra>${line.name}, seed ${seed}</extra>`,
    }));

  // A style that is no branch (the eigenvalues' groups) is never hidden by a branch's chip.
  const shownLines = (quantity) => quantity.lines.filter((line) => !choice.hidden.has(line.style));
  const tracesOf = (quantity) =>
    shownLines(quantity)
      .flatMap((line) => {
        const style = study.styles[line.style];
        const draw = choice.eachSeed ? seedTraces : bandTraces;
        return draw(line, style, colourOf(style)).map((trace) => ({ ...trace, showlegend: false }));
      });

  const layoutOf = (panel, quantity) => {
    const text = variable("--muted");
    const axis = {
      gridcolor: variable("--grid"), linecolor: variable("--line"), zeroline: false,
      tickfont: { color: text, size: 11.5 }, automargin: true,
    };
    const title = (of) => ({ text: of, font: { color: text, size: 12.5 }, standoff: 8 });
    const marked = study.branchPoint !== null;
    return {
      autosize: true,
      margin: { l: 54, r: 12, t: 22, b: 44 },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: getComputedStyle(document.body).fontFamily, color: variable("--text") },
      hovermode: shownLines(quantity).length > 8 ? "closest" : "x unified",
      hoverlabel: {
        bgcolor: variable("--card"), bordercolor: variable("--line"),
        font: { color: variable("--text"), size: 12 },
      },
      modebar: {
        bgcolor: "rgba(0,0,0,0)", color: text, activecolor: variable("--accent"),
      },
      dragmode: "zoom",
      xaxis: { ...axis, title: title(study.axisTitle), tickformat: ",d", hoverformat: ",d" },
      yaxis: {
        ...axis, title: title(quantity.axisTitle), type: panel.log ? "log" : "linear",
        exponentformat: "power", nticks: 7, ...(panel.log ? logTicks(quantity) : {}),
      },
      shapes: marked ? [{
        type: "line", x0: study.branchPoint, x1: study.branchPoint, y0: 0, y1: 1, yref: "paper",
        line: { color: text, width: 1, dash: "2px,2px" }, layer: "below",
      }] : [],
      annotations: marked ? [{
        x: study.branchPoint, y: 1, yref: "paper", yanchor: "bottom", text: "branch point",
        showarrow: false, font: { color: text, size: 11 },
      }] : [],
      uirevision: `${panel.log}/${quantity.label}`,
    };
  };

  // Plain numbers at 1, 2 and 5 where the values span less than two decades.
  const logTicks = (quantity) => {
    const values = shownLines(quantity).flatMap((line) => [...line.low, ...line.high]);
    const shown = values.filter((value) => value > 0);
    const low = shown.reduce((a, b) => Math.min(a, b), Infinity);
    const high = shown.reduce((a, b) => Math.max(a, b), 0);
    if (!(high / low < 300)) return {};
    const steps = high / low < 4 ? [1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8] : [1, 2, 5];
    const first = Math.floor(Math.log10(low));
    const decades = Array.from({ length: Math.ceil(Math.log10(high)) - first + 1 }, (_, at) => first + at);
    const ticks = decades.flatMap((power) => steps.map((step) => Number(`${step}e${power}`)));
    return { tickvals: ticks, ticktext: ticks.map(String), tickmode: "array" };
  };

  const draw = (panel) => {
    const quantity = panel.quantities[panel.shown];
    panel.plot.setAttribute("aria-label", `${panel.title}: ${quantity.axisTitle}`);
    return Plotly.react(panel.plot, tracesOf(quantity), layoutOf(panel, quantity), {
      responsive: true, displaylogo: false, displayModeBar: true,
      // Named one by one: plotly's own choice has a button that sends the chart to its servers.
      modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
      toImageButtonOptions: { filename: panel.name, scale: 3 },
    });
  };
  const drawAll = () => Promise.all(panels.map(draw));

  const addPanel = (described) => {
    const panel = { ...described, shown: 0 };
    const card = element("article", described.wide ? "panel wide" : "panel");
    card.id = `panel-${described.name}`;
    card.append(element("h3", "", described.title));
    const controls = element("div", "controls");
    if (panel.quantities.length > 1) {
      controls.append(switchOf("quantity", panel.quantities.map((q) => q.label), 0, (index) => {
        panel.shown = index;
        draw(panel);
      }));
    }
    controls.append(switchOf("scale", ["linear", "log"], panel.log ? 1 : 0, (index) => {
      panel.log = index === 1;
      draw(panel);
    }));
    panel.plot = element("div", "plot");
    panel.plot.setAttribute("role", "img");
    card.append(controls, panel.plot, element("p", "caption", described.caption));
    document.getElementById("panels").append(card);
    panels.push(panel);
  };

  const chip = (name) => {
    const style = study.styles[name];
    const button = element("button", "chip");
    button.type = "button";
    button.setAttribute("aria-pressed", "true");
    const picture = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    const stroke = document.createElementNS("http://www.w3.org/2000/svg", "line");
    const attributes = { x1: 0, x2: 34, y1: 6, y2: 6, "stroke-width": 3 };
    if (style.dash !== "solid") attributes["stroke-dasharray"] = style.dash.replaceAll("px", "");
    Object.entries(attributes).forEach(([key, value]) => stroke.setAttribute(key, value));
    picture.setAttribute("viewBox", "0 0 34 12");
    picture.append(stroke);
    button.append(picture, element("span", "", style.label));
    button.addEventListener("click", () => show([name], choice.hidden.has(name)));
    button.paint = () => {
      stroke.setAttribute("stroke", colourOf(style));
      button.setAttribute("aria-pressed", String(!choice.hidden.has(name)));
    };
    button.paint();
    return button;
  };

  // Shows or hides all of the named branches at once.
  const groupButton = (text, names) => {
    const button = element("button", "group", text);
    button.type = "button";
    const shown = () => names.filter((name) => !choice.hidden.has(name)).length;
    button.addEventListener("click", () => show(names, shown() < names.length));
    button.paint = () => {
      const state = shown() === names.length ? "true" : shown() ? "mixed" : "false";
      button.setAttribute("aria-pressed", state);
    };
    button.paint();
    return button;
  };

  // The shortest branch with whose name this one begins, Dom- and Bulk- apart: adam of adam-start.
  const stemOf = (name) => {
    const words = name.replace(/^(dom|bulk)-/, "").split("-");
    const stems = words.map((_, at) => words.slice(0, words.length - at).join("-"));
    return stems.reverse().find((stem) => study.branches.includes(stem)) ?? "";
  };
  const grouped = (names, keyOf) =>
    names.reduce((groups, name) => {
      const key = keyOf(name);
      return groups.set(key, [...(groups.get(key) ?? []), name]);
    }, new Map());

  // One row of chips, or with many branches a row for each optimizer below buttons for the parts.
  const legendOf = () => {
    const chipOf = new Map(study.branches.map((name) => [name, chip(name)]));
    if (!many) {
      const row = element("div", "chips");
      row.append(...chipOf.values());
      return { box: row, buttons: [...chipOf.values()] };
    }
    const box = element("div", "families");
    const parts = grouped(study.branches, (name) => /^(dom|bulk)-/.exec(name)?.[1] ?? "whole");
    const titles = { whole: "unsplit", dom: "Dom", bulk: "Bulk" };
    const heads = [
      groupButton("all", study.branches),
      ...[...parts].map(([part, names]) => groupButton(titles[part], names)),
    ];
    const top = element("div", "chips");
    top.append(...heads);
    box.append(element("span", "hint", `${study.branches.length} branches`), top);
    grouped(study.branches, stemOf).forEach((names, stem) => {
      const head = groupButton(stem ? study.styles[stem].label : "others", names);
      const row = element("div", "chips");
      row.append(...names.map((name) => chipOf.get(name)));
      heads.push(head);
      box.append(head, row);
    });
    return { box, buttons: [...chipOf.values(), ...heads] };
  };

  const show = (names, shown) => {
    names.forEach((name) => (shown ? choice.hidden.delete(name) : choice.hidden.add(name)));
    repaint();
  };

  const toolbar = document.getElementById("toolbar");
  toolbar.classList.toggle("many", many);
  const legend = legendOf();
  toolbar.append(legend.box);
  const seeds = new Set(study.panels.flatMap((panel) =>
    panel.quantities.flatMap((q) => q.lines.flatMap((line) => Object.keys(line.seeds)))));
  if (seeds.size > 1) {
    toolbar.append(switchOf("seeds", ["mean and range of seeds", "each seed"], 0, (index) => {
      choice.eachSeed = index === 1;
      drawAll();
    }));
  }
  const repaint = () => {
    legend.buttons.forEach((button) => button.paint());
    return drawAll();
  };
  study.panels.forEach(addPanel);
  dark.addEventListener("change", repaint);
  addEventListener("beforeprint", () => { choice.printing = true; repaint(); });
  addEventListener("afterprint", () => { choice.printing = false; repaint(); });
  drawAll().then(() => { document.body.dataset.ready = "yes"; });
})();
