// Checks answers of a server, as they are on standard input, with the real schemas of @trigger.dev/core.
const v3 = require("@trigger.dev/core/v3");

const chunks = [];
process.stdin.on("data", (chunk) => chunks.push(chunk));
process.stdin.on("end", () => {
  const problems = [];
  for (const [name, answer] of JSON.parse(Buffer.concat(chunks).toString())) {
    if (v3[name] === undefined) problems.push(`there is no schema ${name}`);
    else {
      const parsed = v3[name].safeParse(answer);
      if (!parsed.success) problems.push(`${name}: ${parsed.error.message}`);
    }
  }
  process.stdout.write(JSON.stringify(problems));
});
