// Vercel's `ai` with its providers for OpenAI (three APIs) and Anthropic.

import { createAnthropic } from '@ai-sdk/anthropic'
import { createOpenAI } from '@ai-sdk/openai'
import { Output, generateText, streamText } from 'ai'
import { z } from 'zod'
import { main } from './driving.mjs'

globalThis.AI_SDK_LOG_WARNINGS = false
const schema = z.object({ city: z.string() })
const settings = (job) => ({ apiKey: 'sk-test', baseURL: `${job.url}/v1`, headers: job.headers })
const models = {
  'openai.chat()': (job) => createOpenAI(settings(job)).chat(job.model),
  'openai.responses()': (job) => createOpenAI(settings(job)).responses(job.model),
  'openai.completion()': (job) => createOpenAI(settings(job)).completion(job.model),
  'anthropic()': (job) => createAnthropic(settings(job))(job.model),
}

const header = (response, seen) => seen.mark('header', response.headers?.['x-guard-action'] === 'annotate')

function calls(name, model) {
  return {
    [`generateText(${name})`]: async (job, seen) => {
      const result = await generateText({ model: model(job), prompt: job.prompt })
      await seen.say(result.text)
      seen.end(result.finishReason)
      header(result.response, seen)
    },
    [`generateText(${name}, Output.object)`]: async (job, seen) => {
      const output = Output.object({ schema })
      const result = await generateText({ model: model(job), prompt: job.prompt, output })
      await seen.say(result.text)
      seen.end(result.finishReason)
      void result.output
      header(result.response, seen)
    },
    [`streamText(${name})`]: async (job, seen) => {
      const result = streamText({ model: model(job), prompt: job.prompt, onError: () => {} })
      for await (const part of result.fullStream) {
        if (part.type === 'text-delta') await seen.say(part.text)
        if (part.type === 'error') throw part.error
        if (part.type === 'finish') seen.end(part.finishReason)
      }
      header(await result.response, seen)
    },
  }
}

await main(Object.assign({}, ...Object.entries(models).map(([name, model]) => calls(name, model))))
