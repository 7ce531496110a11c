"""GPT-2's byte-pair tokenizer, from the bundled vocabulary; it needs no network.

    >>> get_tokenizer().encode_ordinary("Hello world")
    [15496, 995]

Use `encode_ordinary` for text from outside: it reads a literal `<|endoftext|>` as plain characters, for which
`encode` raises an error.
"""

import base64
import hashlib
from functools import lru_cache

import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str

from support.errors import require
from support.paths import DATA

VOCABULARY = DATA / "gpt2.tiktoken"
VOCABULARY_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"


@lru_cache
def get_tokenizer(name: str = "gpt2") -> tiktoken.Encoding:
    """The encoding called `name`, of which only "gpt2" is bundled: 50,257 tokens, `eot_token` 50256.

    Raises UserError for another name, or if the vocabulary file is missing or altered.
    """
    require(name == "gpt2", f"tokenizer_encoding '{name}' is not bundled; use 'gpt2'")
    vocabulary = VOCABULARY.read_bytes() if VOCABULARY.exists() else b""
    # One altered line would shift token ids without any error.
    intact = hashlib.sha256(vocabulary).hexdigest() == VOCABULARY_SHA256
    remedy = "restore it with `git checkout -- data/gpt2.tiktoken`"
    require(intact, f"{VOCABULARY}: missing or altered (wrong sha256); {remedy}")
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, vocabulary.splitlines())}
    return tiktoken.Encoding(
        name="gpt2",
        pat_str=r50k_pat_str,
        mergeable_ranks=ranks,
        special_tokens={"<|endoftext|>": 50256},
        explicit_n_vocab=50257,
    )
