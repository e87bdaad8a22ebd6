"use strict";
// The table of points sorts and filters; every cell of it and of the pictures leads to its study.
(() => {
  const element = (name, text = "") => {
    const made = document.createElement(name);
    made.textContent = text;
    return made;
  };

  const table = document.getElementById("points-table");
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  const rows = [...body.rows].map((row) => {
    const texts = [...row.cells].map((cell) => cell.textContent);
    const settings = heads.map((head, at) => `${head.dataset.name} = ${texts[at]}`)
      .filter((_, at) => heads[at].className === "setting").join(", ");
    return { row, texts, settings, all: texts.join(" ").toLowerCase(), href: row.dataset.href };
  });
  const inOrder = [...rows];

  for (const { row, href } of rows) {
    for (const cell of row.cells) {
      if (cell.firstElementChild) continue;
      const link = element("a", cell.textContent);
      link.href = href;
      link.tabIndex = -1;
      cell.replaceChildren(link);
    }
  }

  // The number of a cell and the words before it: "✓ holds 0.95", "6 of 18", "0.1", "all".
  const partsOf = (text) => {
    const plain = text.replace(/\u2212/g, "-").replace("∞", "Infinity").trim();
    const leading = parseFloat(plain);
    if (!Number.isNaN(leading)) return { words: "", value: leading };
    const [, words, last] = /^(.*?)\s*(\S*)$/.exec(plain);
    return Number.isNaN(Number(last || NaN)) ? { words: plain, value: NaN } : { words, value: Number(last) };
  };

  const compare = (one, other) => {
    const [a, b] = [partsOf(one), partsOf(other)];
    const words = a.words.localeCompare(b.words, undefined, { numeric: true });
    return words || (a.value < b.value ? -1 : a.value > b.value ? 1 : 0);
  };

  const sortBy = (column) => {
    const head = heads[column];
    const now = head.getAttribute("aria-sort");
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    if (now !== "descending") head.setAttribute("aria-sort", now ? "descending" : "ascending");
    const sign = now ? -1 : 1;
    const isMissing = (entry) => entry.texts[column] === "–";
    const sorted = now === "descending" ? inOrder : [...inOrder].sort((a, b) =>
      // What is missing comes last in both directions.
      isMissing(a) - isMissing(b) || sign * compare(a.texts[column], b.texts[column]));
    body.append(...sorted.map((entry) => entry.row));
  };

  heads.forEach((head, column) => {
    const button = element("button", head.textContent);
    button.type = "button";
    button.addEventListener("click", () => sortBy(column));
    head.replaceChildren(button);
  });

  const holds = {
    "<": (a, b) => a < b, "<=": (a, b) => a <= b, ">": (a, b) => a > b, ">=": (a, b) => a >= b,
    "=": (a, b) => a === b, "!=": (a, b) => a !== b,
  };
  const columnOf = (name) => {
    const names = heads.map((head) => head.dataset.name.toLowerCase());
    const exact = names.indexOf(name);
    return exact >= 0 ? exact : names.findIndex((known) => known.startsWith(name));
  };
  // A word is looked for in the whole row; `name<number` and the like compare one column.
  const testOf = (word) => {
    const [, name, sign, value] = /^(.+?)(<=|>=|!=|<|>|=)(.+)$/.exec(word) ?? [];
    const column = sign ? columnOf(name) : -1;
    if (column < 0) return (entry) => entry.all.includes(word);
    const wanted = Number(value);
    return (entry) => {
      const text = entry.texts[column];
      const found = partsOf(text).value;
      if (!Number.isNaN(wanted) && !Number.isNaN(found)) return holds[sign](found, wanted);
      const words = text.toLowerCase();
      const same = heads[column].className === "verdict" ? words.includes(value) : words === value;
      return sign === "=" ? same : sign === "!=" && !same;
    };
  };

  const field = document.getElementById("filter");
  const shown = document.getElementById("shown");
  const filter = () => {
    const tests = field.value.toLowerCase().split(/\s+/).filter(Boolean).map(testOf);
    let count = 0;
    for (const entry of rows) {
      const kept = tests.every((test) => test(entry));
      entry.row.hidden = !kept;
      count += kept;
    }
    shown.textContent = tests.length ? `${count} of ${rows.length} points` : "";
  };
  field.addEventListener("input", filter);
  field.closest(".filter").hidden = false;
  filter();

  const regions = JSON.parse(document.getElementById("sweep-data").textContent);
  for (const picture of document.querySelectorAll(".picture")) {
    const links = (regions[picture.dataset.figure] ?? []).map(([point, left, top, width, height, said]) => {
      const link = element("a");
      const { href, settings } = rows[point];
      link.href = href;
      link.title = `${settings}: ${said}`;
      link.tabIndex = -1;
      Object.assign(link.style, { left: `${left}%`, top: `${top}%`, width: `${width}%`, height: `${height}%` });
      return link;
    });
    picture.append(...links);
  }
  document.body.dataset.ready = "yes";
})();
