// Starts a Python script as a Trigger.dev task does, with the real @trigger.dev/python, inside a task's context.
const { taskContext, logger } = require("@trigger.dev/core/v3");
const { OtelTaskLogger, StandardTraceContextManager } = require("@trigger.dev/core/v3/workers");
const { TriggerTracer } = require("@trigger.dev/core/v3/tracer");
const core = require("@trigger.dev/core/v3");
const { NodeTracerProvider } = require("@opentelemetry/sdk-trace-node");
const { python } = require("@trigger.dev/python");

const { script, payload, attempt } = JSON.parse(process.argv[2]);

async function main() {
  new NodeTracerProvider().register();
  const tracer = new TriggerTracer({ name: "tests", version: "1" });
  if (core.traceContext !== undefined && StandardTraceContextManager !== undefined) {
    core.traceContext.setGlobalManager(new StandardTraceContextManager());
  }
  logger.setGlobalTaskLogger(new OtelTaskLogger({ logger: { emit() {} }, tracer, level: "none" }));
  taskContext.setGlobalTaskContext({
    ctx: {
      task: { id: "python-task", filePath: "t.ts" },
      attempt: { number: attempt, startedAt: new Date(), id: "attempt_1", backgroundWorkerId: "w", backgroundWorkerTaskId: "t", status: "EXECUTING" },
      run: { id: "run_from_node", tags: [], isTest: false, createdAt: new Date(), startedAt: new Date(), durationMs: 0, costInCents: 0, baseCostInCents: 0, version: "1" },
      queue: { id: "q", name: "q" },
      environment: { id: "e", slug: "dev", type: "DEVELOPMENT" },
      organization: { id: "o", slug: "o", name: "o" },
      project: { id: "p", ref: "p", slug: "p", name: "p" },
      machine: { name: "micro", cpu: 1, memory: 1, centsPerMs: 0 },
    },
    worker: { id: "w", contentHash: "c", version: "1", engine: "V2" },
    isWarmStart: false,
  });
  const done = await python.runScript(script, [JSON.stringify(payload)]);
  process.stdout.write(JSON.stringify({ exitCode: done.exitCode, stdout: done.stdout }));
}

main().then(
  () => process.exit(0),
  (error) => {
    console.error(error);
    process.exit(1);
  },
);
