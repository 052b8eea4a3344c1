// Drives a server with the real SDK, whose own schemas check every answer; prints what it saw as JSON.
const { configure, tasks, runs, batch, idempotencyKeys } = require("@trigger.dev/sdk");

const { url, key } = JSON.parse(process.argv[2]);
configure({ baseURL: url, accessToken: key });

const terminal = ["COMPLETED", "CANCELED", "FAILED", "CRASHED", "SYSTEM_FAILURE", "EXPIRED", "TIMED_OUT"];

async function ended(id) {
  for (let tries = 0; tries < 300; tries++) {
    const run = await runs.retrieve(id);
    if (terminal.includes(run.status)) return run;
    await new Promise((resolve) => setTimeout(resolve, 100));
  }
  throw new Error(`${id} did not end`);
}

async function main() {
  const seen = {};
  const first = await tasks.trigger("echo", { hello: "wörld", when: new Date(0) }, { tags: ["user_1", "org:2"], metadata: { a: 1 } });
  seen.polled = await runs.poll(first.id, { pollIntervalMs: 200 });
  seen.retrieved = await ended(first.id);
  seen.text = (await ended((await tasks.trigger("echo", "as it is")).id)).output;
  seen.nothing = (await ended((await tasks.trigger("kind", undefined)).id)).output;

  const idempotencyKey = await idempotencyKeys.create("order-42", { scope: "global" });
  const once = await tasks.trigger("kind", [1], { idempotencyKey, idempotencyKeyTTL: "1h" });
  const twice = await tasks.trigger("kind", [1], { idempotencyKey, idempotencyKeyTTL: "1h" });
  seen.cached = [once.id === twice.id, once.isCached, twice.isCached];

  const large = await tasks.trigger("echo", { text: "x".repeat(200_000) });
  seen.large = (await ended(large.id)).output.text.length;

  const many = await tasks.batchTrigger("echo", [1, 2, 3].map((n) => ({ payload: { n } })));
  seen.batch = [];
  const listed = await runs.list({ batch: many.batchId, limit: 10 });
  for (const run of listed.data) seen.batch.push((await ended(run.id)).output.n);
  seen.batchRetrieved = await batch.retrieve(many.batchId);

  const delayed = await tasks.trigger("echo", 1, { delay: "1h", ttl: "10m", queue: "q1", concurrencyKey: "ck", maxAttempts: 3, priority: 5 });
  seen.delayed = await runs.retrieve(delayed.id);
  seen.rescheduled = await runs.reschedule(delayed.id, { delay: "2h" });
  seen.cancel = await runs.cancel(delayed.id);
  seen.cancelled = await ended(delayed.id);

  const replayed = await runs.replay(first.id);
  seen.replayed = [(await ended(replayed.id)).status, replayed.id !== first.id];

  const failing = await tasks.trigger("fail", {}, { maxAttempts: 1 });
  seen.failed = await ended(failing.id);

  try {
    await tasks.trigger("echo", 1, { tags: ["x".repeat(129)] });
  } catch (error) {
    seen.refused = [error.constructor.name, error.status];
  }
  try {
    await runs.retrieve("run_nobody");
  } catch (error) {
    seen.missing = [error.constructor.name, error.status];
  }
  const page = await runs.list({ limit: 2, taskIdentifier: ["echo"] });
  seen.pages = page.data.map((run) => run.id);
  for await (const run of await runs.list({ limit: 2, taskIdentifier: ["echo"] })) {
    seen.pages.push(run.id);
    if (seen.pages.length > 8) break;
  }
  process.stdout.write(JSON.stringify(seen));
}

main().then(
  () => process.exit(0),
  (error) => {
    console.error(error);
    process.exit(1);
  },
);
