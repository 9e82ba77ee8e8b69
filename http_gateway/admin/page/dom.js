/* Building blocks of the page. Text becomes text nodes and nothing else: no string is ever read as HTML. */

const SVG = "http://www.w3.org/2000/svg";
const ICONS = {
  menu: "M4 7h16M4 12h16M4 17h16",
  plus: "M12 5v14M5 12h14",
  send: "M12 19V5M6 11l6-6 6 6",
  stop: "M7 7h10v10H7z",
  copy: "M9 9h10v10H9zM5 15V5h10",
  done: "M5 12.5l4.5 4.5L19 7.5",
  again: "M19 12a7 7 0 1 1-2.1-5M19 4v4h-4",
  edit: "M5 19l1-4L16.5 4.5l3 3L9 18zM14 7l3 3",
  remove: "M5 7h14M10 7V5h4v2M7 7l1 12h8l1-12",
  settings: "M4 7h9M17 7h3M4 17h3M11 17h9M13 7a2 2 0 1 0 4 0 2 2 0 1 0-4 0M7 17a2 2 0 1 0 4 0 2 2 0 1 0-4 0",
  down: "M12 5v14M6 13l6 6 6-6",
  close: "M6 6l12 12M18 6L6 18",
  left: "M14 6l-6 6 6 6",
  right: "M10 6l6 6-6 6",
  tokens: "M4 8h5v8H4zM11 8h3v8h-3zM16 8h4v8h-4z",
  theme: "M12 3a9 9 0 1 0 0 18zM12 3a9 9 0 0 1 0 18M12 7a5 5 0 0 1 0 10",
  play: "M8 5l11 7-11 7z",
  tool: "M14 6a4 4 0 0 0 5 5l-8 8a2.1 2.1 0 0 1-4-4l8-8zM14 6l3-2",
};

/* An element. Attributes whose value is false, null or undefined are left out; functions listen to events. Children may
   come in lists, which may be long: a call cannot have so many arguments. */
export function make(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}

export function svg(name, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, name), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (value !== false && value !== null && value !== undefined) {
      element.setAttribute(name, value === true ? "" : String(value));
    }
  }
  for (const child of children.flat()) {
    if (child !== null && child !== undefined && child !== false) element.append(child);
  }
  return element;
}

export function icon(name) {
  const path = svg("path", { d: ICONS[name] });
  return svg("svg", { viewBox: "0 0 24 24", class: `icon icon-${name}`, "aria-hidden": "true" }, path);
}

/* A button with an icon; its label is read aloud and shown when the pointer rests on it. */
export function iconButton(name, label, onClick, attributes = {}) {
  return make(
    "button",
    { type: "button", class: "icon-button", "aria-label": label, title: label, click: onClick, ...attributes },
    icon(name),
  );
}

export function byId(id) {
  return document.getElementById(id);
}

/* Say something to those who listen to the page instead of seeing it. */
export function announce(text) {
  byId("live").textContent = text;
}

/* Copy text. Pages without TLS have no clipboard of their own, but on this machine: there the old way serves. */
export async function copyText(text) {
  if (navigator.clipboard && window.isSecureContext) return navigator.clipboard.writeText(text);
  const area = make("textarea", { class: "hidden-text", "aria-hidden": "true" });
  area.value = text;
  document.body.append(area);
  area.select();
  const copied = document.execCommand("copy");
  area.remove();
  if (!copied) throw new Error("The browser does not allow copying.");
}

export function copyButton(label, textOf) {
  const button = iconButton("copy", label, async () => {
    try {
      await copyText(textOf());
      show("done", "Copied");
    } catch (error) {
      show("close", String(error.message || error));
    }
    setTimeout(() => show("copy", label), 1500);
  });
  function show(name, said) {
    button.replaceChildren(icon(name));
    button.title = said;
    if (said !== label) announce(said);
  }
  return button;
}

/* Have the browser keep a text as a file. */
export function saveFile(name, text) {
  const address = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  const link = make("a", { href: address, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}

/* Browsers offer randomUUID on pages with TLS only. */
export function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(12));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}
