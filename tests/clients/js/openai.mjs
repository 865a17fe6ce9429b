// Every way to ask with the openai SDK.

import OpenAI from 'openai'
import { zodResponseFormat, zodTextFormat } from 'openai/helpers/zod'
import { z } from 'zod'
import { main } from './driving.mjs'

const Weather = z.object({ city: z.string() })
const client = (job) => new OpenAI({ apiKey: 'sk-test', baseURL: `${job.url}/v1`, defaultHeaders: job.headers })
const chat = (job) => ({ model: job.model, messages: [{ role: 'user', content: job.prompt }] })
const text = (job) => ({ model: job.model, prompt: job.prompt })
const ask = (job) => ({ model: job.model, input: job.prompt })

function annotated(answer, seen) {
  const side = answer.moderation?.output
  seen.mark('moderation', (side?.results?.[0] ?? side)?.flagged === true)
}

async function completion(answer, seen) {
  for (const choice of answer.choices) {
    await seen.say(choice.message?.content ?? choice.delta?.content ?? choice.text)
    seen.end(choice.finish_reason)
  }
  annotated(answer, seen)
}

async function response(answer, seen) {
  if (!seen.text) await seen.say(answer.output_text)
  const why = answer.incomplete_details
  seen.end(why ? `${answer.status}: ${why.reason}` : answer.status)
  annotated(answer, seen)
}

async function responseEvent(event, seen) {
  if (event.type === 'response.output_text.delta') await seen.say(event.delta)
  else if (['response.completed', 'response.incomplete', 'response.failed'].includes(event.type))
    await response(event.response, seen)
}

await main({
  'chat.create': async (job, seen) => completion(await client(job).chat.completions.create(chat(job)), seen),
  'chat.create stream': async (job, seen) => {
    for await (const part of await client(job).chat.completions.create({ ...chat(job), stream: true }))
      await completion(part, seen)
  },
  'chat.stream()': async (job, seen) => {
    const events = client(job).chat.completions.stream(chat(job))
    for await (const part of events) await seen.say(part.choices[0]?.delta?.content)
    const final = await events.finalChatCompletion()
    seen.end(final.choices[0].finish_reason)
    annotated(final, seen)
  },
  'chat.parse()': async (job, seen) => {
    const format = { response_format: zodResponseFormat(Weather, 'weather') }
    await completion(await client(job).chat.completions.parse({ ...chat(job), ...format }), seen)
  },
  'responses.create': async (job, seen) => response(await client(job).responses.create(ask(job)), seen),
  'responses.create stream': async (job, seen) => {
    for await (const event of await client(job).responses.create({ ...ask(job), stream: true }))
      await responseEvent(event, seen)
  },
  'responses.stream()': async (job, seen) => {
    const events = client(job).responses.stream(ask(job))
    for await (const event of events) await responseEvent(event, seen)
    await response(await events.finalResponse(), seen)
  },
  'responses.parse()': async (job, seen) => {
    const format = { text: { format: zodTextFormat(Weather, 'weather') } }
    await response(await client(job).responses.parse({ ...ask(job), ...format }), seen)
  },
  'completions.create': async (job, seen) => completion(await client(job).completions.create(text(job)), seen),
  'completions.create stream': async (job, seen) => {
    for await (const part of await client(job).completions.create({ ...text(job), stream: true }))
      await completion(part, seen)
  },
})
