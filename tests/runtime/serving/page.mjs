// Runs the script of the page against a document of a few lines, and prints what a person would see.
// Arguments: a JSON file with `script`, `text`, `pair`, and for each address its `status` and `body`.
import { readFileSync } from "node:fs";

const { script, text, pair, served } = JSON.parse(readFileSync(process.argv[2], "utf8"));
class Element {
  children = [];
  textContent = "";
  className = "";
  addEventListener(_, listener) { this.submitted = listener; }
  appendChild(child) { this.children.push(child); return child; }
  replaceChildren(...children) { this.children = children; }
  insertRow() { return this.appendChild(new Element()); }
  insertCell() { return this.appendChild(new Element()); }
}
const elements = {};
const sent = [];
globalThis.document = {
  getElementById: (id) => (elements[id] ??= new Element()),
  createElement: () => new Element(),
};
globalThis.fetch = async (address, options) => {
  if (options) sent.push(JSON.parse(options.body));
  if (!served[address]) throw new TypeError("fetch failed");
  const { status, body } = served[address];
  return { ok: status === 200, status, json: async () => JSON.parse(body) };
};
(0, eval)(script);
document.getElementById("text").value = text;
document.getElementById("pair").value = pair;
await elements.form.submitted({ preventDefault() {} });
const cells = (row) => row.children.map((cell) => cell.children[0]?.value ?? cell.textContent);
const shown = (id) => document.getElementById(id);
console.log(JSON.stringify({
  sent,
  model: shown("model").textContent,
  settings: shown("settings").textContent,
  watched: [shown("watched").textContent, shown("watched").className],
  depth: shown("depth").textContent,
  ladder: shown("ladder").children.map((step) => [step.textContent, step.className]),
  scores: shown("scores").children.map((row) => [row.className, ...cells(row)]),
  hidden: shown("answer").hidden,
  error: shown("error").textContent,
  disabled: shown("button").disabled,
}));
