/* Markdown, as models write it, becomes DOM nodes. A text that grows is rendered from its last block on. */

import { copyButton, make } from "./dom.js";
import { highlight } from "./highlight.js";
import { inline } from "./inline.js";

const MAX_DEPTH = 12; // of lists and quotes in each other
const FENCE = /^ {0,3}(`{3,}(?!`)|~{3,}(?!~))([^`\n]*)$/; // one way to read a line only, however long it is
const HEADING = /^ {0,3}(#{1,6})(?=[ \t]|$)/;
const RULE = /^ {0,3}([-*_])[ \t]*(?:\1[ \t]*){2,}$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])( {1,4}(?=\S)| +|$)/;
const INTERRUPTING_ITEM = /^ *([-*+]|1[.)]) +\S/; // a line that begins with "2026." goes on with its paragraph
const TASK = /^\[([ xX])\] +/;

/* Shows a Markdown text in an element. */
export class MarkdownView {
  constructor(root) {
    this.root = root;
    this.text = "";
    this.blocks = []; // {at: offset in the text, node}
  }

  /* Show this text. What was shown of the same beginning stays, but for the last block. `growing`: more will come. */
  update(text, growing = false) {
    if (text === this.text && growing === this.growing) return;
    const same = text.startsWith(this.text.slice(0, this.#settled));
    const kept = same ? this.blocks.filter((block) => block.at < this.#settled) : [];
    const from = same ? this.#settled : 0;
    const lines = text.slice(from).split("\n");
    const starts = [];
    lines.reduce((at, line) => (starts.push(at), at + line.length + 1), from);
    const found = blocksOf(lines.map(untabbed), 0).map((block) => ({
      at: starts[block.line],
      node: render(block, growing),
    }));
    this.blocks.slice(kept.length).forEach((block) => block.node.remove());
    for (const { node } of found) this.root.append(node);
    this.blocks = [...kept, ...found];
    this.text = text;
    this.growing = growing;
  }

  /* Up to where the blocks stay as they are, whatever follows: lines that begin a block so far may turn out to belong
     to the one before, as long as they are the last two. */
  get #settled() {
    const lastLine = this.text.lastIndexOf("\n");
    const certain = lastLine < 1 ? 0 : this.text.lastIndexOf("\n", lastLine - 1) + 1;
    return this.blocks.filter((block) => block.at < certain).at(-1)?.at ?? 0;
  }
}

/* A whole text as nodes. */
export function markdown(text) {
  return blocksOf(text.split("\n").map(untabbed), 0).map((block) => render(block, false));
}

function untabbed(line) {
  const text = line.endsWith("\r") ? line.slice(0, -1) : line;
  const lead = text.slice(0, indentOf(text));
  return lead.includes("\t") ? lead.replaceAll("\t", "    ") + text.slice(lead.length) : text;
}

/* blocks */

function blocksOf(lines, depth) {
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (!lines[at].trim()) {
      at++;
      continue;
    }
    const block = blockAt(lines, at, depth);
    blocks.push({ ...block, line: at });
    at = block.next;
  }
  return blocks;
}

function blockAt(lines, at, depth) {
  const line = lines[at];
  const fence = FENCE.exec(line);
  if (fence) return fenceAt(lines, at, fence);
  if (HEADING.test(line))
    return { type: "heading", level: HEADING.exec(line)[1].length, text: headingText(line), next: at + 1 };
  if (RULE.test(line)) return { type: "rule", next: at + 1 };
  if (depth < MAX_DEPTH && QUOTE.test(line)) return quoteAt(lines, at, depth);
  if (depth < MAX_DEPTH && ITEM.test(line)) return listAt(lines, at, depth);
  if (isTable(lines, at)) return tableAt(lines, at);
  return paragraphAt(lines, at, depth);
}

function startsBlock(lines, at, depth) {
  const line = lines[at];
  const nests = depth < MAX_DEPTH && (QUOTE.test(line) || INTERRUPTING_ITEM.test(line));
  return FENCE.test(line) || HEADING.test(line) || RULE.test(line) || nests || isTable(lines, at);
}

function paragraphAt(lines, at, depth) {
  let next = at + 1;
  while (next < lines.length && lines[next].trim() && !startsBlock(lines, next, depth)) next++;
  return {
    type: "paragraph",
    text: lines
      .slice(at, next)
      .map((line) => line.trimStart())
      .join("\n"),
    next,
  };
}

function headingText(line) {
  let text = line.trim().replace(/^#+/, "").trim();
  let end = text.length;
  while (text[end - 1] === "#") end--;
  if (end < text.length && (end === 0 || text[end - 1] === " ")) text = text.slice(0, end).trimEnd();
  return text;
}

function fenceAt(lines, at, [, marks, about]) {
  const indent = indentOf(lines[at]);
  let next = at + 1;
  while (next < lines.length && !closesFence(lines[next], marks)) next++;
  const code = lines.slice(at + 1, next).map((line) => line.slice(Math.min(indent, indentOf(line))));
  const closed = next < lines.length;
  return {
    type: "code",
    language: about.trim().split(/\s/)[0],
    code: code.join("\n"),
    closed,
    next: closed ? next + 1 : next,
  };
}

function closesFence(line, marks) {
  const text = line.trim();
  return text.length >= marks.length && indentOf(line) < 4 && text === marks[0].repeat(text.length);
}

function quoteAt(lines, at, depth) {
  let next = at;
  while (next < lines.length && QUOTE.test(lines[next])) next++;
  const inside = lines.slice(at, next).map((line) => line.replace(QUOTE, ""));
  return { type: "quote", blocks: blocksOf(inside, depth + 1), next };
}

function indentOf(line) {
  return line.length - line.trimStart().length;
}

/* A list with all its items. Lines that are indented further belong to the item before. */
function listAt(lines, at, depth) {
  const first = ITEM.exec(lines[at]);
  const base = first[1].length;
  const ordered = /\d/.test(first[2]);
  const items = [];
  let loose = false;
  let next = at;
  let item = null;
  while (next < lines.length) {
    const line = lines[next];
    const blank = !line.trim();
    const mark = blank || RULE.test(line) ? null : ITEM.exec(line);
    const afterBlank = next > at && !lines[next - 1].trim();
    if (blank) item.push("");
    else if (mark && mark[1].length < base + 2 && mark[1].length > base - 2 && /\d/.test(mark[2]) === ordered) {
      item = [line.slice(mark[0].length)];
      item.offset = mark[0].length;
      loose ||= afterBlank && items.length > 0;
      items.push(item);
    } else if (indentOf(line) >= base + 2) {
      loose ||= afterBlank && !mark;
      item.push(line.slice(Math.min(item.offset, indentOf(line))));
    } else if (afterBlank || mark || startsBlock(lines, next, depth)) break;
    else item.push(line);
    next++;
  }
  const start = ordered ? Number.parseInt(first[2], 10) : 1;
  return { type: "list", ordered, start, loose, items: items.map((own) => itemOf(own, depth)), next };
}

function itemOf(lines, depth) {
  const task = TASK.exec(lines[0]);
  const own = task ? [lines[0].slice(task[0].length), ...lines.slice(1)] : lines;
  return { task: task ? task[1] !== " " : null, blocks: blocksOf(own, depth + 1) };
}

function cellsOf(line) {
  const text = line.trim().replace(/^\|/, "");
  const cells = [""];
  for (let at = 0; at < text.length; at++) {
    if (text[at] === "\\" && text[at + 1] === "|") cells[cells.length - 1] += text[++at];
    else if (text[at] === "|") cells.push("");
    else cells[cells.length - 1] += text[at];
  }
  if (cells.length > 1 && !cells.at(-1).trim()) cells.pop();
  return cells.map((cell) => cell.trim());
}

function isTable(lines, at) {
  const ruler = lines[at + 1];
  if (!lines[at].includes("|") || !ruler || !/^[ \t|:-]+$/.test(ruler) || !ruler.includes("-")) return false;
  const columns = cellsOf(ruler);
  return columns.every((cell) => /^:?-+:?$/.test(cell)) && columns.length === cellsOf(lines[at]).length;
}

function tableAt(lines, at) {
  let next = at + 2;
  while (next < lines.length && lines[next].trim() && lines[next].includes("|")) next++;
  const sides = cellsOf(lines[at + 1]).map((cell) =>
    cell.endsWith(":") ? (cell.startsWith(":") ? "center" : "right") : "left",
  );
  return { type: "table", head: cellsOf(lines[at]), rows: lines.slice(at + 2, next).map(cellsOf), sides, next };
}

/* nodes */

const RENDER = {
  paragraph: (block) => make("p", {}, inline(block.text)),
  heading: (block) => make(`h${Math.min(block.level + 2, 6)}`, { class: `level-${block.level}` }, inline(block.text)),
  rule: () => make("hr"),
  quote: (block, growing) =>
    make(
      "blockquote",
      {},
      block.blocks.map((inner) => render(inner, growing)),
    ),
  list: renderList,
  table: renderTable,
  code: renderCode,
};

function render(block, growing) {
  return RENDER[block.type](block, growing);
}

function renderList(block, growing) {
  const items = block.items.map((item) => {
    const inside = item.blocks.map((inner) => render(inner, growing));
    if (item.task === null) return make("li", {}, inside);
    return make(
      "li",
      { class: "task" },
      make("input", { type: "checkbox", disabled: true, checked: item.task, "aria-label": "done" }),
      inside,
    );
  });
  const start = block.ordered && block.start !== 1 ? block.start : null;
  return make(block.ordered ? "ol" : "ul", { class: block.loose ? "loose" : "tight", start }, items);
}

function renderTable(block) {
  const cell = (name) => (text, column) => make(name, { class: `side-${block.sides[column]}` }, inline(text));
  const row = (cells, name) => make("tr", {}, cells.slice(0, block.sides.length).map(cell(name)));
  const body = block.rows.map((cells) => row(cells, "td"));
  const table = make("table", {}, make("thead", {}, row(block.head, "th")), make("tbody", {}, body));
  return make("div", { class: "table-frame", tabindex: "0", role: "group", "aria-label": "Table" }, table);
}

function renderCode(block, growing) {
  const coloured = block.closed || !growing ? highlight(block.code, block.language) : [block.code];
  const head = make(
    "div",
    { class: "code-head" },
    make("span", {}, block.language || "text"),
    copyButton("Copy the code", () => block.code),
  );
  return make("div", { class: "code-block" }, head, make("pre", { tabindex: "0" }, make("code", {}, coloured)));
}
