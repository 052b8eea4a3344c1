// Reads one JSON document from stdin: {"inject": [...], "extract": [...]}; answers with what OpenTelemetry JS makes of it.
'use strict';

const { ROOT_CONTEXT, defaultTextMapGetter, defaultTextMapSetter, propagation, trace } = require('@opentelemetry/api');
const { CompositePropagator, W3CBaggagePropagator, W3CTraceContextPropagator, TraceState } = require('@opentelemetry/core');

const propagator = new CompositePropagator({
  propagators: [new W3CTraceContextPropagator(), new W3CBaggagePropagator()],
});

function extract(headers) {
  const context = propagator.extract(ROOT_CONTEXT, headers, defaultTextMapGetter);
  const span = trace.getSpanContext(context);
  const baggage = propagation.getBaggage(context);
  return {
    span: span && {
      traceId: span.traceId,
      spanId: span.spanId,
      traceFlags: span.traceFlags,
      traceState: span.traceState ? span.traceState.serialize() : '',
    },
    baggage: baggage ? Object.fromEntries(baggage.getAllEntries().map(([name, entry]) => [name, entry.value])) : {},
  };
}

function inject({ span, baggage }) {
  const entries = Object.fromEntries(Object.entries(baggage).map(([name, value]) => [name, { value }]));
  let context = propagation.setBaggage(ROOT_CONTEXT, propagation.createBaggage(entries));
  context = trace.setSpanContext(context, { ...span, traceState: new TraceState(span.traceState) });
  const headers = {};
  propagator.inject(context, headers, defaultTextMapSetter);
  return headers;
}

const chunks = [];
process.stdin.on('data', (chunk) => chunks.push(chunk));
process.stdin.on('end', () => {
  const asked = JSON.parse(Buffer.concat(chunks).toString('utf8'));
  process.stdout.write(JSON.stringify({ extracted: asked.extract.map(extract), injected: asked.inject.map(inject) }));
});
