// Runs the script of the page against a document of a few lines, and prints what a person would see.
// Arguments: a JSON file with `script`, the `values` of inputs, and for each address its `status` and
// `body`.
import { readFileSync } from "node:fs";

const { script, values, served } = JSON.parse(readFileSync(process.argv[2], "utf8"));
class Element {
  children = [];
  textContent = "";
  className = "";
  value = "";
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
for (const [id, value] of Object.entries(values)) document.getElementById(id).value = value;
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
  titles: shown("titles").children.flatMap(cells),
  button: shown("button").textContent,
  forms: ["classifies", "ranks"].filter((id) => !shown(id).hidden && !shown(id).disabled),
  hidden: shown("answer").hidden,
  error: shown("error").textContent,
  disabled: shown("button").disabled,
}));
