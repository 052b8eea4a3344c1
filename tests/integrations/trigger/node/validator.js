// A server that parses every request of a client with the real schemas of @trigger.dev/core, and refuses what they refuse.
// They strip keys that they don't know, so what was parsed is compared with what was sent, key by key.
const http = require("node:http");
const v3 = require("@trigger.dev/core/v3");

const FREE = new Set(["payload", "context", "metadata", "value"]);

function unknown(sent, parsed, path = "") {
  if (Array.isArray(sent)) {
    return sent.flatMap((each, index) => unknown(each, Array.isArray(parsed) ? parsed[index] : undefined, `${path}[${index}]`));
  }
  if (sent === null || typeof sent !== "object") return [];
  return Object.keys(sent).flatMap((key) => {
    if (parsed === null || typeof parsed !== "object" || !(key in parsed)) return [`${path}.${key}`];
    return FREE.has(key) ? [] : unknown(sent[key], parsed[key], `${path}.${key}`);
  });
}

const ROUTES = [
  ["POST", /^\/api\/v1\/tasks\/[^/]+\/trigger$/, "TriggerTaskRequestBody", () => ({ id: "run_validated", isCached: false })],
  ["POST", /^\/api\/v3\/batches$/, "CreateBatchRequestBody", (body) => ({ id: "batch_validated", runCount: body.runCount, isCached: false })],
  ["POST", /^\/api\/v3\/batches\/[^/]+\/items$/, "BatchItemNDJSON", (items) => ({ id: "batch_validated", itemsAccepted: items.length, itemsDeduplicated: 0, sealed: true })],
  ["POST", /^\/api\/v1\/runs\/[^/]+\/tags$/, "AddTagsRequestBody", () => ({ message: "ok" })],
  ["POST", /^\/api\/v1\/runs\/[^/]+\/reschedule$/, "RescheduleRunRequestBody", () => ({ id: "run_validated", status: "DELAYED" })],
];

const requests = [];

const server = http.createServer((request, response) => {
  const chunks = [];
  request.on("data", (chunk) => chunks.push(chunk));
  request.on("end", () => {
    const text = Buffer.concat(chunks).toString();
    const path = request.url.split("?")[0];
    if (path === "/seen") return answer(200, requests);
    const route = ROUTES.find(([method, pattern]) => method === request.method && pattern.test(path));
    if (route === undefined) return answer(404, { error: "no such route" });
    const [, , name, reply] = route;
    const ndjson = name === "BatchItemNDJSON";
    let sent;
    try {
      sent = ndjson ? text.split("\n").filter(Boolean).map((line) => JSON.parse(line)) : JSON.parse(text);
    } catch (error) {
      return answer(400, { error: `no JSON: ${error.message}` });
    }
    const problems = [];
    for (const each of ndjson ? sent : [sent]) {
      const parsed = v3[name].safeParse(each);
      if (!parsed.success) problems.push(parsed.error.message);
      else problems.push(...unknown(each, parsed.data));
    }
    requests.push({ path, name, headers: request.headers, sent, problems });
    return problems.length ? answer(400, { error: problems.join("; ") }) : answer(200, reply(sent));
  });
  function answer(status, body) {
    response.writeHead(status, { "content-type": "application/json" });
    response.end(JSON.stringify(body));
  }
});

server.listen(0, "127.0.0.1", () => process.stdout.write(`${server.address().port}\n`));
process.stdin.on("end", () => process.exit(0)).resume();
