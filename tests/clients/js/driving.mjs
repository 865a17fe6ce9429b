// What every driver shares: jobs in on standard input, one line of JSON per job out. Jobs run a few at a time, because
// clients that retry wait for seconds.

const AT_ONCE = 6

export class Seen {
  constructor(job) {
    Object.assign(this, { job, text: '', finish: null, marks: new Set() })
  }

  async say(piece) {
    const first = piece && !this.text
    this.text += piece ?? ''
    if (first && this.job.go) await fetch(this.job.go)
  }

  end(reason) {
    this.finish = reason ?? this.finish
  }

  mark(name, present) {
    if (present) this.marks.add(name)
  }
}

// The exception as an application can tell it apart: its class, status and code.
function described(raised) {
  const last = raised.lastError ?? raised
  return {
    type: raised.name?.startsWith('AI_') ? raised.name : raised.constructor.name,
    status: last.status ?? last.statusCode ?? null,
    code: last.code ?? last.errorCode ?? last.data?.error?.code ?? last.error?.error?.details?.code ?? null,
    message: String(raised.message ?? raised).slice(0, 600),
  }
}

async function done(call, job) {
  const seen = new Seen(job)
  let error = null
  try {
    await call(job, seen)
  } catch (raised) {
    error = described(raised)
    seen.end(raised.finishReason)
  }
  return { id: job.id, text: seen.text, finish: seen.finish, marks: [...seen.marks].sort(), error }
}

export async function main(calls) {
  let input = ''
  for await (const piece of process.stdin) input += piece
  const jobs = JSON.parse(input)
  const work = async () => {
    for (let job = jobs.shift(); job; job = jobs.shift()) {
      console.log('result', JSON.stringify(await done(calls[job.call], job)))
    }
  }
  await Promise.all(Array.from({ length: AT_ONCE }, work))
}
