"""Limits on input from strangers, and numbers and default choices that several files share.

A number that tunes one file only stands at the top of that file, with its reason.
"""

from __future__ import annotations

# Text form (docs/ir.md, Limits).
INLINE_ELEMENTS = 16  # the printer writes arrays up to this size inline, larger ones by hash
MAX_INLINE_ELEMENTS = 4096  # the parser reads inline arrays up to this size
MAX_LINE = 1 << 26  # characters of a line
MAX_LINES = 1 << 22
MAX_ITEMS = 1 << 22  # integers in all lists of one file: `[0-9999999999]` is short to write
MAX_EXTENT = 1 << 40  # elements of one value, folds times units
MAX_RANK = 32  # axes of a value; NumPy 1 has no more
MAX_SCOPE_BYTES = 1 << 30  # of all scopes in one file
MAX_SCOPE_WORK = 1 << 33  # bytes of scopes read while the scopes of a file are computed
MAX_SCOPE_RUNS = 64  # a scope of more runs prints as a digest, so that text stays linear
MAX_TEXT_BYTES = 1 << 30  # of a .pcir file
MAX_QUOTED = 240  # characters of a message
MAX_SHOWN_FOLDS = 64  # scopes of a type in a message

# Verifier.
SHOWN_FINDINGS = 10  # findings printed in place; the error counts the others
SHOWN_OPERANDS = 4  # operand lines printed above a finding

# Evaluators.
MAX_STATES = 1 << 16  # joint states that enumeration lists
MAX_VALUE = 1 << 30  # elements of one value that the interpreter computes (8 GiB)
ROWS = 4096  # rows per evaluation of the reference
CELLS = 1 << 25  # float64 values that one node may hold in the reference (256 MiB)

# Frontends.
MAX_TRIALS = 1000  # of a binomial: its coefficients stay within float64
MAX_ARRAY_BYTES = 4 << 30  # of all arrays in one .npz file, unpacked
MAX_YAML_BYTES = 1 << 20  # of a checkpoint's config.yaml
MAX_HEADER_BYTES = 64 << 20  # of a safetensors file
MAX_WINDOW = 4096  # tokens that a checkpoint's circuit may draft
MAX_REGIONS = 1 << 16  # of a region graph in a configuration
MAX_REGIONS_TEXT = 1 << 22  # characters of it

# Verifiers.
MAX_MODEL_SIZE = 1 << 24  # of one dimension in a configuration: larger is a broken file
LAZY_ELEMENTS = 1 << 18  # of a matrix that stays in its file until it is written (1 MiB of f32)
EVA_SPAN = 256  # widest pass over EvaByte's ring once it wraps: 12 % more rows than its window
MAX_NGRAM = 64  # ids of a subword in byte-Llama's dictionary

# Generation.
PROPOSAL = "full"  # sampled drafts: all experts, the highest acceptance
DRAFT_MODE = "stepwise"  # greedy drafts: accepted more than max-product by every shipped head
PREFILL_CHUNK = 64  # prompt tokens of one pass: wide enough for matrix products, small to pad
FIRST_BUCKET = 512  # rows of the smallest state buffers; each next size doubles
SEED = 0  # of random weights
SEQUENCE = 2048  # tokens of the longest sequence, unless told
MAX_SEQ = 1 << 20
MAX_BATCH = 4096  # rows of a graph with fixed shapes
MAX_CONFIG_BYTES = 16 << 20  # of a JSON file beside a model
MAX_TEMPLATE = 1 << 16  # characters of a chat template
MAX_TOKENS = 1 << 24  # ids and positions that a manifest may declare
MAX_STATE_BYTES = 1 << 44  # of one state tensor of one row: beyond it a number is a mistake

# Prompts and explorations.
MAX_PROMPT_BYTES = 64 << 20  # of a file of prompts
MAX_PROMPT_FILES = 1 << 20  # of a folder of prompts
MAX_HEADS = 10_000  # that the patterns of an exploration may name
MAX_RESULT_BYTES = 1 << 28  # of results.jsonl: some hundred thousand points

# Checks of generation.
CHECK_TOKENS = 64  # greedy tokens compared with autoregressive decoding
CHECK_PARAMETERS = 1 << 27  # numbers of a verifier that the float64 evaluator takes (1 GiB)
# Of a graph's output, relative to its largest value beyond 1, by what the coarsest weight is
# stored in: results of half products are rounded by 2^-11 or 2^-8, layer by layer.
CHECK_TOLERANCE = {"f32": 5e-5, "f16": 1e-2, "bf16": 8e-2}
# By the same: the lead of a logit over another below which passes may choose differently, and how
# far a uniform may lie from the edge of its cell (`pcc.ties`).
LOGIT_TIES = {"f32": 1e-3, "f16": 0.05, "bf16": 0.3}
CHANCE_TIES = {"f32": 1e-5, "f16": 2e-3, "bf16": 2e-2}

# Bundles and the engine.
MAX_MANIFEST_BYTES = 16 << 20
MAX_ROW_ELEMENTS = 1 << 28  # of one row of an input that a manifest declares
MAX_THREADS = 1024
