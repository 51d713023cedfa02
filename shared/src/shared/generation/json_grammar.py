"""A JSON schema as a grammar in which every document has one layout, that of `json.dumps`.

vLLM offers free whitespace, in which some models loop until the token limit
(github.com/vllm-project/vllm/issues/38696), or none at all, which few models were trained to write. A fixed ", " and
": " has neither fault, so the schema is turned into a grammar here and vLLM is given the grammar.
"""

import json
from functools import lru_cache
from typing import Any

from shared.errors import UserError


def json_grammar(schema: dict[str, Any]) -> str:
    """EBNF of the documents of `schema`, keys in the schema's order; UserError where the schema cannot be enforced."""
    return _grammar(json.dumps(schema))


@lru_cache(maxsize=4096)
def _grammar(schema: str) -> str:
    import xgrammar
    from vllm.v1.structured_output.backend_xgrammar import has_xgrammar_unsupported_json_features

    if has_xgrammar_unsupported_json_features(json.loads(schema)):
        raise UserError(
            f"the grammar engine cannot enforce every rule of this json_schema, simplify it: {schema}"
        )
    try:
        return str(xgrammar.Grammar.from_json_schema(schema, any_whitespace=False, separators=(", ", ": ")))
    except RuntimeError as error:
        raise UserError(f"json_schema is no valid JSON schema ({error}): {schema}") from error
