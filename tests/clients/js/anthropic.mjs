// Every way to ask with @anthropic-ai/sdk.

import Anthropic from '@anthropic-ai/sdk'
import { betaZodTool } from '@anthropic-ai/sdk/helpers/beta/zod'
import { zodOutputFormat } from '@anthropic-ai/sdk/helpers/zod'
import { z } from 'zod'
import { main } from './driving.mjs'

const Weather = z.object({ city: z.string() })
// A tool that leaves a mark when it runs.
const tool = (seen) =>
  betaZodTool({
    name: 'look_up',
    description: 'Looks something up.',
    inputSchema: z.object({ query: z.string() }),
    run: ({ query }) => {
      seen.mark('the tool ran', query)
      return `Nothing on ${query}.`
    },
  })
const client = (job) => new Anthropic({ apiKey: 'sk-test', baseURL: job.url, defaultHeaders: job.headers })
const ask = (job) => ({ model: job.model, max_tokens: 512, messages: [{ role: 'user', content: job.prompt }] })
const header = (response, seen) => seen.mark('header', response.headers.get('x-guard-action') === 'annotate')

async function message(answer, seen) {
  const text = answer.content.filter((block) => block.type === 'text').map((block) => block.text)
  if (!seen.text) await seen.say(text.join(''))
  seen.end(answer.stop_reason)
  seen.mark('x_guard', answer.x_guard)
}

async function event(part, seen) {
  if (part.type === 'content_block_delta') await seen.say(part.delta.text)
  else if (part.type === 'message_delta') {
    seen.end(part.delta.stop_reason)
    seen.mark('x_guard', part.x_guard)
  }
}

await main({
  'messages.create': async (job, seen) => {
    const { data, response } = await client(job).messages.create(ask(job)).withResponse()
    header(response, seen)
    await message(data, seen)
  },
  'messages.create stream': async (job, seen) => {
    const { data, response } = await client(job).messages.create({ ...ask(job), stream: true }).withResponse()
    header(response, seen)
    for await (const part of data) await event(part, seen)
  },
  'messages.stream()': async (job, seen) => {
    const events = client(job).messages.stream(ask(job))
    for await (const part of events) await event(part, seen)
    await message(await events.finalMessage(), seen)
  },
  'messages.parse()': async (job, seen) => {
    const format = { output_config: { format: zodOutputFormat(Weather) } }
    await message(await client(job).messages.parse({ ...ask(job), ...format }), seen)
  },
  'toolRunner()': async (job, seen) => {
    await message(await client(job).beta.messages.toolRunner({ ...ask(job), tools: [tool(seen)] }), seen)
  },
  'toolRunner() stream': async (job, seen) => {
    for await (const events of client(job).beta.messages.toolRunner({ ...ask(job), tools: [tool(seen)], stream: true }))
      for await (const part of events) await event(part, seen)
  },
})
