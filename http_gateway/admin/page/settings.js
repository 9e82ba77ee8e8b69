/* The panel with the settings of a conversation: system prompt, sampling, shape of the output, tools. */

import { DEFAULTS, parsedSchema, parsedTools } from "./conversation.js";
import { byId, iconButton, make } from "./dom.js";

const FIELDS = [
  [
    "",
    [["system", "System prompt", { kind: "text", rows: 4, hint: "What the model is told before the conversation." }]],
  ],
  [
    "Sampling",
    [
      ["temperature", "Temperature", { min: 0, max: 10, step: 0.1, hint: "0 always takes the most likely token." }],
      ["top_p", "Top p", { min: 0, max: 1, step: 0.05 }],
      ["top_k", "Top k", { min: -1, step: 1, whole: true }],
      ["min_p", "Min p", { min: 0, max: 1, step: 0.05 }],
      ["max_tokens", "Most tokens", { min: 1, step: 1, whole: true }],
      ["seed", "Seed", { step: 1, whole: true }],
      ["frequency_penalty", "Frequency penalty", { min: -2, max: 2, step: 0.1 }],
      ["presence_penalty", "Presence penalty", { min: -2, max: 2, step: 0.1 }],
      ["repetition_penalty", "Repetition penalty", { min: 0, max: 2, step: 0.05 }],
      ["stop", "Stop strings", { kind: "text", rows: 2, code: true, hint: "One a line; \\n stands for a line end." }],
    ],
  ],
  [
    "Thinking",
    [
      [
        "thinking",
        "The model thinks",
        {
          kind: "choice",
          choices: [
            ["default", "As its template says"],
            ["on", "Yes"],
            ["off", "No"],
          ],
        },
      ],
      ["thinking_budget", "Most tokens of a thought", { min: 0, step: 1, whole: true }],
    ],
  ],
  [
    "Output",
    [
      ["logprobs", "Colour tokens by their probability", { kind: "switch" }],
      ["top_logprobs", "Alternatives for each token", { min: 0, max: 20, step: 1, whole: true, needed: true }],
      [
        "schema",
        "JSON schema",
        { kind: "text", rows: 5, code: true, check: parsedSchema, hint: "The answer will be JSON of this shape." },
      ],
      [
        "tools",
        "Tools",
        {
          kind: "text",
          rows: 5,
          code: true,
          check: parsedTools,
          hint: "A list of functions: name, description, parameters.",
        },
      ],
    ],
  ],
];

export class SettingsPanel {
  /* `onChange(settings)`: the settings of the conversation that is shown are now these. */
  constructor(onChange) {
    this.root = byId("settings");
    this.onChange = onChange;
    this.settings = { ...DEFAULTS };
    this.inputs = new Map();
    this.problems = new Map();
    this.root.append(this.#head(), ...FIELDS.map(([title, fields]) => this.#group(title, fields)));
  }

  #head() {
    const reset = make("button", { type: "button", class: "link-button", click: () => this.#reset() }, "Reset");
    this.close = iconButton("close", "Close the settings", () => this.toggle(false));
    return make("div", { class: "settings-head" }, make("h2", {}, "Settings"), reset, this.close);
  }

  /* Show the panel, or put it away. */
  toggle(open = this.root.hidden) {
    const opener = byId("open-settings");
    this.root.hidden = !open;
    opener.setAttribute("aria-expanded", String(open));
    byId("shade").hidden = !open && !document.body.classList.contains("with-sidebar");
    document.body.classList.toggle("with-settings", open);
    (open ? this.close : opener).focus();
  }

  /* Show the settings of another conversation. */
  show(settings) {
    this.settings = settings;
    for (const [name, { input, kind }] of this.inputs) {
      if (kind === "switch") input.checked = settings[name];
      else input.value = settings[name] ?? "";
      this.#judge(name);
    }
  }

  /* What is wrong with them; empty where nothing is. */
  get problem() {
    return [...this.problems.values()][0] || "";
  }

  #reset() {
    this.show({ ...DEFAULTS });
    this.onChange(this.settings);
  }

  #group(title, fields) {
    const rows = fields.map(([name, label, options]) => this.#row(name, label, options));
    return make("fieldset", {}, title ? make("legend", {}, title) : null, ...rows);
  }

  #row(name, label, options) {
    const id = `setting-${name}`;
    const kind = options.kind || "number";
    const input = inputOf(id, kind, options);
    const about = make("p", { class: "about", id: `${id}-about` }, options.hint || "");
    input.setAttribute("aria-describedby", about.id);
    this.inputs.set(name, { input, kind, options, about, label });
    input.addEventListener("input", () => this.#changed(name));
    const title = make("label", { for: id }, label);
    return make("div", { class: `setting ${kind}` }, ...(kind === "switch" ? [input, title] : [title, input]), about);
  }

  #changed(name) {
    const { input, kind, options } = this.inputs.get(name);
    if (!this.#judge(name)) return;
    let value = kind === "switch" ? input.checked : input.value;
    if (kind === "number") value = input.value === "" ? (options.needed ? DEFAULTS[name] : null) : Number(input.value);
    this.settings = { ...this.settings, [name]: value };
    this.onChange(this.settings);
  }

  /* Say what is wrong with a field; whether nothing is. A text is kept even so: it may be half written. */
  #judge(name) {
    const { input, kind, options, about, label } = this.inputs.get(name);
    let problem = "";
    if (kind === "number") problem = numberProblem(input, options);
    else if (options.check) problem = problemOf(() => options.check(input.value));
    about.textContent = problem || options.hint || "";
    about.classList.toggle("problem", Boolean(problem));
    input.setAttribute("aria-invalid", String(Boolean(problem)));
    if (problem) this.problems.set(name, kind === "number" ? `${label}: ${problem}` : problem);
    else this.problems.delete(name);
    return !problem || kind === "text";
  }
}

function inputOf(id, kind, options) {
  if (kind === "text")
    return make("textarea", {
      id,
      rows: options.rows,
      class: options.code ? "code" : null,
      spellcheck: options.code ? "false" : null,
    });
  if (kind === "switch") return make("input", { id, type: "checkbox" });
  if (kind === "choice")
    return make("select", { id }, ...options.choices.map(([value, text]) => make("option", { value }, text)));
  const { min, max, step } = options;
  return make("input", {
    id,
    type: "number",
    min,
    max,
    step,
    placeholder: "default",
    inputmode: options.whole ? "numeric" : "decimal",
  });
}

function numberProblem(input, { min, max, whole }) {
  if (input.validity.badInput) return "This is no number.";
  if (input.value === "") return "";
  const value = Number(input.value);
  if (whole && !Number.isSafeInteger(value)) return "A whole number is needed.";
  if (min !== undefined && value < min) return `${min} is the least.`;
  if (max !== undefined && value > max) return `${max} is the most.`;
  return "";
}

function problemOf(check) {
  try {
    check();
    return "";
  } catch (error) {
    return error.message;
  }
}
