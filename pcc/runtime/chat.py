"""Chat templates: the model's own Jinja text, in a sandbox. Needs the extra `chat` (jinja2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pcc.errors import PccError
from pcc.knobs import MAX_TEMPLATE

if TYPE_CHECKING:
    from pcc.runtime.engine import Engine


BOS = "\ue000bos\ue000"  # stands for the BOS token while a template is rendered


def apply_template(engine: Engine, prompt: bytes) -> tuple[bytes, bool]:
    """Return the prompt as one user turn in the model's chat template, and whether BOS precedes it.

    BOS comes first where the template begins with it. Other special tokens that a template spells
    out are their text: byte-level models read bytes.
    """
    template = engine.generation().get("chat_template")
    if not isinstance(template, str):
        raise PccError(
            "S150", "the model has no chat template", hint="give the whole prompt without --chat"
        )
    if len(template) > MAX_TEMPLATE:
        raise PccError("S151", f"the chat template has {len(template)} characters")
    try:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise PccError("X221", "jinja2 is not installed", hint="pip install 'pcc[chat]'") from None
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    turn = [{"role": "user", "content": prompt.decode("utf-8", "replace")}]
    try:
        text = environment.from_string(template).render(
            messages=turn, add_generation_prompt=True, bos_token=BOS, eos_token=""
        )
    except (TemplateError, TypeError, ValueError, ArithmeticError, RecursionError) as e:
        raise PccError("S151", f"the chat template fails: {type(e).__name__} {e}") from None
    return text.replace(BOS, "").encode("utf-8"), text.startswith(BOS)
