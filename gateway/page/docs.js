/** The REST API, drawn from /openapi.json (OpenAPI 3.1). */

import { byId, element } from "./dom.js";
import { request, serverUrl } from "./server.js";

const METHODS = ["get", "post", "put", "patch", "delete"];

let document31 = {};

/** Return what a local reference such as `#/components/schemas/Word` names. */
function resolve(schema) {
  if (!schema?.$ref) {
    return schema ?? {};
  }
  return schema.$ref.slice(2).split("/").reduce((node, key) => node[key], document31);
}

/** Return a schema's type in words. */
function typeOf(schema) {
  const { type, items, anyOf, enum: choices, const: only, $ref } = schema ?? {};
  if ($ref) {
    return $ref.split("/").at(-1);
  }
  if (choices) {
    return choices.join(", ");
  }
  if (only !== undefined) {
    return String(only);
  }
  if (anyOf) {
    return anyOf.map(typeOf).join(" or ");
  }
  return type === "array" ? `list of ${typeOf(items)}` : type ?? "any";
}

/** Return text whose parts in backquotes are code. */
function prose(text = "") {
  return text.split("`").map((part, i) => (i % 2 ? element("code", {}, part) : part));
}

function table(headings, rows) {
  const head = element("tr", {}, ...headings.map((heading) => element("th", {}, heading)));
  const body = rows.map((cells) => element("tr", {}, ...cells.map((cell) => element("td", {}, ...[cell].flat()))));
  return element("table", {}, element("thead", {}, head), element("tbody", {}, ...body));
}

function section(heading, ...content) {
  return [element("h3", {}, heading), ...content];
}

function parameters(list = []) {
  const rows = list.map(resolve).map(({ name, in: place, description, schema }) => [
    element("code", {}, name), place, typeOf(schema), schema?.default === undefined ? "" : String(schema.default), prose(description),
  ]);
  return rows.length ? section("Parameters", table(["name", "in", "values", "default", "meaning"], rows)) : [];
}

function fields(schema) {
  const { properties = {} } = resolve(schema);
  return Object.entries(properties).map(([name, property]) => [
    element("code", {}, name), typeOf(property), prose(property.description ?? property.title),
  ]);
}

function body(requestBody) {
  const rows = Object.entries(requestBody?.content ?? {}).map(([kind, { schema }]) => [element("code", {}, kind), typeOf(schema)]);
  return rows.length ? section("Body", table(["content type", "values"], rows)) : [];
}

function responses(all = {}) {
  const rows = Object.entries(all).map(([status, { description }]) => [status, prose(description)]);
  const answer = fields(all["200"]?.content?.["application/json"]?.schema);
  return [
    ...(answer.length ? section("Answer", table(["field", "type", "meaning"], answer)) : []),
    ...section("Status", table(["HTTP", "when"], rows)),
  ];
}

function example(method, path, operation) {
  const url = serverUrl(path.slice(1).replace("{model}", "amira"));
  const data = method === "post" && operation.requestBody ? ' \\\n  --data-binary @speech.wav -H "Content-Type: application/octet-stream"' : "";
  return section("Example", element("pre", { tabIndex: 0 }, element("code", {}, `curl ${url}${data}`)));
}

function draw(path, method, operation) {
  const summary = element(
    "summary", {},
    element("span", { className: "method" }, method.toUpperCase()),
    element("code", {}, path),
    element("span", {}, operation.summary ?? "")
  );
  const octets = operation.requestBody?.content?.["application/octet-stream"];
  const details = element(
    "div", { className: "details", tabIndex: 0 },
    element("p", {}, ...prose(operation.description)),
    ...parameters(operation.parameters),
    ...body(operation.requestBody),
    ...responses(operation.responses),
    ...(method === "get" || octets ? example(method, path, operation) : [])
  );
  details.setAttribute("role", "region");
  details.setAttribute("aria-label", `${method.toUpperCase()} ${path}`);
  return element("details", { className: "operation" }, summary, details);
}

try {
  document31 = await (await request("openapi.json")).json();
  const { info, paths } = document31;
  byId("title").textContent = `${info.title} ${info.version}`;
  byId("description").textContent = info.description;
  byId("operations").replaceChildren(
    ...Object.entries(paths).flatMap(([path, operations]) => METHODS.filter((method) => operations[method])
      .map((method) => draw(path, method, operations[method])))
  );
} catch (error) {
  byId("description").textContent = error.message;
}
