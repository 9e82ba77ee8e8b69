/* The inline part of Markdown: emphasis, code, links. One pass, in linear time, into DOM nodes.

   What comes out are text nodes and elements from a short list. A link leads to http or https or is no link; images are
   links, for the page loads nothing from elsewhere; HTML is text. */

import { make } from "./dom.js";

const PUNCTUATION = /[!-/:-@[-`{-~\p{P}\p{S}]/u;
const SPACE = /\s/;
const MAX_DEPTH = 16; // of emphasis in emphasis
const MAX_ADDRESS = 2000;
const END_OF_ADDRESS = /[.,;:!?'"*_~]+$/;

/* The address of a link, where it leads to the web; null otherwise. */
export function webAddress(text) {
  try {
    const address = new URL(text);
    return address.protocol === "http:" || address.protocol === "https:" ? address.href : null;
  } catch {
    return null;
  }
}

/* Markdown text as nodes, to be appended to an element. */
export function inline(text, links = true) {
  return new Inline(text, links).parse();
}

class Inline {
  constructor(text, links) {
    this.text = text;
    this.links = links;
    this.at = 0;
    this.plain = "";
    this.out = []; // {node, depth}
    this.open = []; // delimiters that may begin emphasis: {mark, count, index}
    this.openOf = { "*": 0, _: 0, "~": 0 };
  }

  parse() {
    while (this.at < this.text.length) {
      const step = STEPS[this.text[this.at]];
      if (!step || !step.call(this)) this.plain += this.text[this.at++];
    }
    this.flush();
    return this.out.map((item) => item.node);
  }

  flush() {
    if (this.plain) this.out.push({ node: document.createTextNode(this.plain), depth: 0 });
    this.plain = "";
  }

  push(node, depth = 1) {
    this.flush();
    this.out.push({ node, depth });
    return true;
  }

  escape() {
    const next = this.text[this.at + 1];
    if (next === "\n") this.push(make("br"));
    else if (next && /[!-/:-@[-`{-~]/.test(next)) this.plain += next;
    else return false;
    this.at += 2;
    return true;
  }

  newline() {
    this.plain = this.plain.trimEnd();
    this.at++;
    return this.push(make("br"));
  }

  code() {
    const length = this.runLength("`");
    const start = this.at + length;
    const end = this.closingTicks(start, length);
    if (end < 0) {
      this.plain += "`".repeat(length);
      this.at = start;
      return true;
    }
    let inside = this.text.slice(start, end).replaceAll("\n", " ");
    if (inside.startsWith(" ") && inside.endsWith(" ") && inside.trim()) inside = inside.slice(1, -1);
    this.at = end + length;
    return this.push(make("code", {}, inside));
  }

  /* Where a run of exactly so many backticks begins behind a place; all runs are found once. */
  closingTicks(from, length) {
    this.ticks ||= ticksOf(this.text);
    const places = this.ticks.get(length) || [];
    while (places.length && places[0] < from) places.shift();
    return places.length ? places[0] : -1;
  }

  runLength(character) {
    let end = this.at;
    while (this.text[end] === character) end++;
    return end - this.at;
  }

  link() {
    const image = this.text[this.at] === "!";
    const start = this.at + (image ? 1 : 0);
    if (!this.links || this.text[start] !== "[") return false;
    this.brackets ||= bracketsOf(this.text);
    const close = this.brackets.get(start);
    if (close === undefined || this.text[close + 1] !== "(") return false;
    const target = targetOf(this.text, close + 2);
    const address = target && webAddress(target.address);
    if (!address) return false;
    const label = this.text.slice(start + 1, close);
    this.at = target.end;
    return this.push(link(address, image ? [label || address] : inline(label, false)));
  }

  angle() {
    const end = this.text.slice(this.at, this.at + MAX_ADDRESS).indexOf(">");
    const inside = end > 0 ? this.text.slice(this.at + 1, this.at + end) : "";
    const address = /^https?:\/\/\S+$/.test(inside) && this.links ? webAddress(inside) : null;
    if (!address) return false;
    this.at += end + 1;
    return this.push(link(address, [inside]));
  }

  bare() {
    if (!this.links || !/^https?:\/\//.test(this.text.slice(this.at, this.at + 8))) return false;
    if (/[\p{L}\p{N}]/u.test(this.text[this.at - 1] || "")) return false;
    let found = /^[^\s<>"`]+/.exec(this.text.slice(this.at, this.at + MAX_ADDRESS))[0].replace(END_OF_ADDRESS, "");
    if (found.endsWith(")") && !found.includes("(")) found = found.replace(/\)+$/, "").replace(END_OF_ADDRESS, "");
    const address = webAddress(found);
    if (!address) return false;
    this.at += found.length;
    return this.push(link(address, [found]));
  }

  /* A run of * or _ or ~: it ends what is open, or begins something, or is text. */
  emphasis() {
    const mark = this.text[this.at];
    const count = this.runLength(mark);
    const before = this.text[this.at - 1] || " ";
    const after = this.text[this.at + count] || " ";
    this.at += count;
    const [opens, closes] = flanks(mark, before, after);
    this.flush();
    let left = closes ? this.close(mark, count) : count;
    const needed = mark === "~" ? 2 : 1;
    if (left >= needed && opens) {
      this.open.push({ mark, count: left, index: this.out.length });
      this.openOf[mark]++;
      this.out.push({ node: document.createTextNode(mark.repeat(left)), depth: 0 });
    } else if (left) {
      this.plain += mark.repeat(left);
    }
    return true;
  }

  /* Wrap what lies between the last opening run of this mark and here; how many of the marks are left. */
  close(mark, count) {
    let left = count;
    while (left > 0 && this.openOf[mark] > 0) {
      while (this.open.at(-1).mark !== mark) this.openOf[this.open.pop().mark]--;
      const opener = this.open.at(-1);
      const used = Math.min(opener.count, left) >= 2 ? 2 : 1;
      if (mark === "~" && used < 2) break;
      this.wrap(opener, mark === "~" ? "del" : used === 2 ? "strong" : "em", used);
      left -= used;
    }
    return left;
  }

  wrap(opener, name, used) {
    const inner = this.out.splice(opener.index + 1);
    const depth = 1 + inner.reduce((most, item) => Math.max(most, item.depth), 0);
    opener.count -= used;
    const mark = this.out[opener.index].node;
    mark.data = opener.mark.repeat(opener.count);
    if (!opener.count) {
      this.out.pop();
      this.open.pop();
      this.openOf[opener.mark]--;
    }
    if (depth > MAX_DEPTH) for (const item of inner) this.out.push(item);
    else
      this.out.push({
        node: make(
          name,
          {},
          inner.map((item) => item.node),
        ),
        depth,
      });
  }
}

const STEPS = {
  "\\": Inline.prototype.escape,
  "\n": Inline.prototype.newline,
  "`": Inline.prototype.code,
  "!": Inline.prototype.link,
  "[": Inline.prototype.link,
  "<": Inline.prototype.angle,
  h: Inline.prototype.bare,
  "*": Inline.prototype.emphasis,
  _: Inline.prototype.emphasis,
  "~": Inline.prototype.emphasis,
};

function link(address, children) {
  return make("a", { href: address, target: "_blank", rel: "noopener noreferrer" }, children);
}

/* Whether a run of marks may begin or end emphasis, by what stands beside it. */
function flanks(mark, before, after) {
  const left = !SPACE.test(after) && (!PUNCTUATION.test(after) || SPACE.test(before) || PUNCTUATION.test(before));
  const right = !SPACE.test(before) && (!PUNCTUATION.test(before) || SPACE.test(after) || PUNCTUATION.test(after));
  if (mark !== "_") return [left, right];
  return [left && (!right || PUNCTUATION.test(before)), right && (!left || PUNCTUATION.test(after))];
}

/* Length of a run of backticks → where such runs begin. */
function ticksOf(text) {
  const places = new Map();
  for (const found of text.matchAll(/`+/g)) {
    const length = found[0].length;
    if (!places.has(length)) places.set(length, []);
    places.get(length).push(found.index);
  }
  return places;
}

/* Opening bracket → its closing one. */
function bracketsOf(text) {
  const pairs = new Map();
  const open = [];
  for (let at = 0; at < text.length; at++) {
    if (text[at] === "\\") at++;
    else if (text[at] === "[") open.push(at);
    else if (text[at] === "]" && open.length) pairs.set(open.pop(), at);
  }
  return pairs;
}

/* The address that begins at a place, up to the parenthesis that ends it, and where that is; null: there is none. */
function targetOf(text, from) {
  const last = Math.min(text.length, from + MAX_ADDRESS);
  let depth = 0;
  let at = from;
  for (; at < last; at++) {
    const character = text[at];
    if (character === "(") depth++;
    else if (character === ")" && depth-- === 0) return { address: text.slice(from, at), end: at + 1 };
    else if (SPACE.test(character)) break;
  }
  const title = /^\s+(?:"[^"\n]{0,300}"|'[^'\n]{0,300}')\s{0,10}\)/.exec(text.slice(at, at + 400));
  return title && at > from ? { address: text.slice(from, at), end: at + title[0].length } : null;
}
