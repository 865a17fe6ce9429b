#!/usr/bin/env bash
# nano from data to R-SFT to RL to report, in one command:
#
#   training/runs/reproduce.sh DATA OUT
#
# DATA holds train.jsonl.gz, train_benign_extra.jsonl.gz and dev.jsonl.gz (labelled rows; see `guard-train evaluate
# --help`). What is finished in OUT is not done again, and what was stopped goes on, so give the same command again
# after a stop. Two CPU cores and 4 GiB of memory; a few hours. The end is OUT/report.html (R-SFT and RL compared) and
# OUT/revision: RL's guard where, on the rows of the bank that training held back, its mean F1 is not lower than
# R-SFT's and its mean false-positive rate at most a point higher; else R-SFT's. DEV has no say in it, and no row of DEV
# is trained on, calibrated on or chosen by.
#
# From the environment, where another value is wanted:
#   GUARD_TRAIN  how guard-train is started          (guard-train)
#   RECIPE       nano's recipe                       (training/recipes/nano.yaml)
#   DEV          the rows to measure on              (DATA/dev.jsonl.gz)
#   LIMIT        rows of a source to measure on      (all)
#   RL_EVERY     RL looks at every n-th training row (8)
#   RL_ROWS      rows of RL                          (2000)
#   RL_KEEP      wrong samples of four that make a row hard enough: the paper's is 4 (1..3)
#   RL_RECIPE    recipe of RL                        (grpo-nano)
#   RL_SET       constants of it, key=value ...      (none)
#   WORDNET      folder of WordNet's data files      (that of Debian's wordnet-base)
set -euo pipefail

if [[ $# -ne 2 || ! -d ${1:-} ]]; then
  sed -n '2,25s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
DATA=$1 OUT=$2
mkdir -p "$OUT/done"
read -ra TRAIN <<<"${GUARD_TRAIN:-guard-train}"
DEV=${DEV:-$DATA/dev.jsonl.gz}
read -ra RL_SETS <<<"${RL_SET:-}"
limit=(${LIMIT:+--limit "$LIMIT"})
RECIPE=${RECIPE:-$(dirname "${BASH_SOURCE[0]}")/../recipes/nano.yaml}
wordnet=(${WORDNET:+--wordnet "$WORDNET"})
sets=()
for one in ${RL_SETS[@]+"${RL_SETS[@]}"}; do sets+=(--set "$one"); done

# A folder belongs to one set of values: with others, what is done in it would be taken for theirs.
values="$DATA|$DEV|$RECIPE|${LIMIT:-}|${RL_EVERY:-}|${RL_ROWS:-}|${RL_KEEP:-}|${RL_RECIPE:-}|${RL_SET:-}|${WORDNET:-}"
if [[ -e $OUT/done/values && $(<"$OUT/done/values") != "$values" ]]; then
  echo "$OUT was begun with other values ($(<"$OUT/done/values")); repeat them, or give another folder" >&2
  exit 2
fi
echo "$values" >"$OUT/done/values"

# step NAME COMMAND...: notes in OUT/done that the command has ended well, and then does not do it again.
step() {
  local name=$1 start=$SECONDS done=$OUT/done/${1// /-}
  shift
  if [[ -e $done ]]; then
    echo "== $name: done before ($done)"
    return
  fi
  echo "== $name: $*"
  "$@"
  touch "$done"
  echo "== $name: $((SECONDS - start)) s"
}

# Every n-th row that is text alone (images stay in DATA), without those that training holds back (by the digest of
# their ids), since scores are calibrated on these, and without what DEV holds. A bad line has no say; the commands
# before have named it.
candidates() {
  gzip -dc "$DATA/train.jsonl.gz" | python3 -c '
import hashlib, json, sys

def trained_on(row):
    return int.from_bytes(hashlib.sha256(str(row["id"]).encode()).digest()[:4], "big") >= 0.03 * 2**32

kept = []
for line in sys.stdin.buffer:
    try:
        row = json.loads(line)
        if row.get("image") is None and trained_on(row):
            kept.append(line)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        pass
sys.stdout.buffer.writelines(kept[:: int(sys.argv[1])])
' "${RL_EVERY:-8}" >"$OUT/every_nth.jsonl"
  "${TRAIN[@]}" corpus check --train "$OUT/every_nth.jsonl" --against "$DEV" --output "$OUT/candidates.jsonl"
}

# calibrate STAGE: scores of what OUT/STAGE holds, before they are measured; on rows that training holds back.
calibrate() {
  "${TRAIN[@]}" calibrate --model "$OUT/$1/model" --data "$DATA/train.jsonl.gz" "$DATA/train_benign_extra.jsonl.gz" \
    --against "$DEV" --output "$OUT/$1/model/calibration.json"
}

# Writes OUT/best: nano or rl. Where no source has both classes there is no F1 to tell that RL is no worse.
choose() {
  python3 -c '
import json, sys
means = json.load(open(sys.argv[1]))["against"]["means"]
f1, wrong = ((means.get(name) or {}).get("difference") for name in ("f1", "false_positive_rate"))
print("rl" if f1 is not None and f1 >= 0 and (wrong or 0) <= 0.01 else "nano")
' "$OUT/rl.bank.json" >"$OUT/best.part"
  mv "$OUT/best.part" "$OUT/best"
}

# A stop between the making of the revision and the note of it leaves a whole one, which is checked.
revision() {
  if [[ -d $OUT/revision ]]; then
    "${TRAIN[@]}" publish "$OUT/revision"
  else
    "${TRAIN[@]}" publish "$OUT/$best/model" --results "$OUT/$best.json" "$OUT/held_out.json" --output "$OUT/revision" --licence apache-2.0 \
      --recipe "$RECIPE" --data "$DATA/train.jsonl.gz" "$DATA/train_benign_extra.jsonl.gz" --bank
  fi
}

begun=$SECONDS
step "R-SFT" \
  "${TRAIN[@]}" nano --data "$DATA" --output "$OUT/nano" --against "$DEV" --recipe "$RECIPE" ${wordnet[@]+"${wordnet[@]}"}

step "TF-IDF baseline" \
  "${TRAIN[@]}" baseline --data "$DATA/train.jsonl.gz" "$DATA/train_benign_extra.jsonl.gz" --evaluate "$DEV" \
  --output "$OUT/tfidf.jsonl" --recipe "$RECIPE"

step "calibration of R-SFT" calibrate nano

step "measuring after R-SFT" \
  "${TRAIN[@]}" evaluate --data "$DEV" --model "$OUT/nano/model" --predictions "tfidf=$OUT/tfidf.jsonl" \
  --outcomes "$OUT/nano.outcomes.jsonl" --report "$OUT/nano.html" --json "$OUT/nano.json" ${limit[@]+"${limit[@]}"}

step "rows for RL" candidates

step "rejection sampling" \
  "${TRAIN[@]}" reject --rows "$OUT/candidates.jsonl" --model "$OUT/nano/model" --output "$OUT/hard.jsonl" \
  --keep "${RL_KEEP:-1..3}" --balance --temperature 0.7 --top-p 0.9 --max-rows "${RL_ROWS:-2000}" \
  --json "$OUT/hard.json"

step "concatenation" \
  "${TRAIN[@]}" augment --rows "$OUT/hard.jsonl" --output "$OUT/rl.jsonl"

step "RL" \
  "${TRAIN[@]}" grpo --rows "$OUT/rl.jsonl" --model "$OUT/nano/model" --recipe "${RL_RECIPE:-grpo-nano}" \
  --output "$OUT/rl" ${sets[@]+"${sets[@]}"}

step "calibration of RL" calibrate rl

step "measuring after RL" \
  "${TRAIN[@]}" evaluate --data "$DEV" --model "$OUT/rl/model" --against "$OUT/nano.outcomes.jsonl" \
  --predictions "tfidf=$OUT/tfidf.jsonl" --outcomes "$OUT/rl.outcomes.jsonl" --report "$OUT/report.html" \
  --json "$OUT/rl.json" ${limit[@]+"${limit[@]}"}

step "R-SFT on the bank" \
  "${TRAIN[@]}" evaluate --data "$OUT/nano/held_out/bank.jsonl" --model "$OUT/nano/model" \
  --outcomes "$OUT/nano.bank.jsonl"

step "RL on the bank" \
  "${TRAIN[@]}" evaluate --data "$OUT/nano/held_out/bank.jsonl" --model "$OUT/rl/model" \
  --against "$OUT/nano.bank.jsonl" --json "$OUT/rl.bank.json"

step "choice" choose
best=$(<"$OUT/best")

step "measuring drawn text" \
  "${TRAIN[@]}" evaluate --data "$OUT/nano/held_out/held_out.jsonl" --model "$OUT/$best/model" \
  --json "$OUT/held_out.json"

step "revision" revision

echo "== all: $((SECONDS - begun)) s; $OUT/report.html, $OUT/revision (of $OUT/$best)"
