/* Colours for code: comments, strings, numbers and words, as far as they can be told apart without a parser. */

import { make } from "./dom.js";

const LONGEST = 40_000; // characters; longer code stays plain
const STRINGS = String.raw`"(?:[^"\\\n]|\\.)*"?|'(?:[^'\\\n]|\\.)*'?`;
const NUMBER = String.raw`\b\d[\w.]*`;
const WORD = String.raw`[A-Za-z_$][\w$]*`;
const SLASHES = String.raw`//[^\n]*|/\*[\s\S]*?(?:\*/|$)`;
const HASH = String.raw`#[^\n]*`;

const words = (text) => new Set(text.split(" "));
const C_LIKE = words(
  "async await break case catch class const continue default delete do else enum export extends false " +
    "final finally fn for func function go if impl import in interface let loop match mod mut new nil " +
    "null package private protected public pub return self static struct super switch this throw throws " +
    "trait true try type typedef undefined use using var void while yield int long float double bool " +
    "boolean char string str auto namespace template override virtual where",
);
const PYTHON = words(
  "and as assert async await break class continue def del elif else except False finally for from " +
    "global if import in is lambda None nonlocal not or pass raise return True try while with yield match " +
    "case self",
);
const SHELL = words(
  "if then else elif fi for in do done while case esac function return export local echo cd set sudo",
);
const SQL = words(
  "select from where and or not insert into values update set delete create table primary key join left " +
    "right inner outer on group by order having limit offset as distinct null is in like between union " +
    "all index drop alter case when then else end",
);

const LANGUAGES = {
  c: { comment: SLASHES, keywords: C_LIKE },
  python: {
    comment: HASH,
    keywords: PYTHON,
    strings: String.raw`"""[\s\S]*?(?:"""|$)|'''[\s\S]*?(?:'''|$)|${STRINGS}`,
  },
  shell: { comment: HASH, keywords: SHELL },
  yaml: { comment: HASH, keywords: words("true false null yes no") },
  sql: { comment: String.raw`--[^\n]*|/\*[\s\S]*?(?:\*/|$)`, keywords: SQL, anyCase: true },
  json: { comment: "(?!)", keywords: words("true false null") },
};
const NAMES = {
  python: "py python3",
  shell: "sh bash zsh console shell",
  yaml: "yml toml ini dockerfile",
  sql: "sql",
  json: "jsonc json5",
  c:
    "cpp c++ h hpp cs csharp java kotlin kt swift go rust rs js javascript jsx " +
    "ts typescript tsx php scala dart zig css scss",
};
const LANGUAGE_OF = new Map(Object.keys(LANGUAGES).map((name) => [name, name]));
for (const [name, others] of Object.entries(NAMES)) others.split(" ").forEach((other) => LANGUAGE_OF.set(other, name));

/* Code as nodes; plain text where the language is not known. */
export function highlight(code, language) {
  const known = LANGUAGES[LANGUAGE_OF.get(language.toLowerCase())];
  if (!known || code.length > LONGEST) return [document.createTextNode(code)];
  const strings = known.strings || String.raw`${STRINGS}|` + "`(?:[^`\\\\]|\\\\.)*`?";
  const parts = new RegExp(`(${known.comment})|(${strings})|(${NUMBER})|(${WORD})`, "g");
  const nodes = [];
  let done = 0;
  for (const found of code.matchAll(parts)) {
    const kind = kindOf(found, known);
    if (!kind) continue;
    if (found.index > done) nodes.push(document.createTextNode(code.slice(done, found.index)));
    nodes.push(make("span", { class: `code-${kind}` }, found[0]));
    done = found.index + found[0].length;
  }
  nodes.push(document.createTextNode(code.slice(done)));
  return nodes;
}

function kindOf([, comment, string, number, word], language) {
  if (comment !== undefined) return "comment";
  if (string !== undefined) return "string";
  if (number !== undefined) return "number";
  return language.keywords.has(language.anyCase ? word.toLowerCase() : word) ? "keyword" : null;
}
