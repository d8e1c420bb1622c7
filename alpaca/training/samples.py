"""See it learn: three held-out prompts, answered greedily before the first step and at each evaluation."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import islice, takewhile

from tqdm import tqdm
from transformers import TrainerCallback

from alpaca.chat_template import asked_of, saved_template
from alpaca.common.text import first_line, printable, shorten
from alpaca.inference.chat import request_ids
from alpaca.inference.generate import STOP, Settings, cut_at, decode, decode_pieces, end_ids
from alpaca.training.distributed import say
from alpaca.training.packing import SEGMENTS, library_attention, set_attention

GREEDY = Settings(max_new_tokens=60, temperature=0)
KEY = "eval_sample_{}"  # in the Trainer's log, and so in TensorBoard, W&B and trackio, and in a checkpoint
ANSWER = "\n\n→ "  # between prompt and answer there


class Samples(TrainerCallback):
    """Answer the first held-out prompts with the tokens and the code with which chat asks, and log them.

    Training does not notice: nothing is drawn at temperature 0, the library has just evaluated, so the model is in
    eval mode, and the attention of flattened batches is put back. Under FSDP every forward pass gathers weights from
    all ranks, so each rank answers all prompts, and always to the last of max_new_tokens: none may end early. Under
    DeepSpeed nothing is answered, since its engine keeps no whole weights for this. A model that cannot generate is
    reported once.

    Args:
        trainer: of the run.
        records: held out; the first ones are used whose prompts are shorter than ``longest`` tokens.
    """

    def __init__(self, trainer, records: Sequence[dict], longest: int):
        self.trainer, self.tokenizer = trainer, trainer.processing_class
        template = saved_template(self.tokenizer)
        asked = ((record, request_ids(self.tokenizer, template, [record])[0]) for record in records)
        chosen = list(islice(((record, ids) for record, ids in asked if len(ids) < longest), 3))
        self.texts = [asked_of(record)[-1]["content"] for record, _ in chosen]
        self.prompts = [ids for _, ids in chosen]
        if trainer.is_deepspeed_enabled and self.prompts:
            self.prompts = []
            say("note: no sample answers under DeepSpeed")

    def on_evaluate(self, args, state, control, **kwargs):
        trainer = self.trainer
        if not self.prompts or not (trainer.is_fsdp_enabled or state.is_world_process_zero):
            return
        try:
            answers = self._answers(trainer.model, trainer.is_fsdp_enabled)
        except Exception as e:  # of any architecture; training goes on
            self.prompts = []
            say(f"note: no sample answers, this model does not generate here: {first_line(e)}")
            return
        pairs = list(zip(self.texts, answers, strict=True))
        trainer.log({KEY.format(n): text + ANSWER + answer for n, (text, answer) in enumerate(pairs)})
        for text, answer in pairs if state.is_world_process_zero else ():
            tqdm.write(f"    {shorten(printable(text), 50)} → {shorten(printable(answer), 100) or '(nothing)'}")
        sys.stdout.flush()
        trainer.meter.pause()

    def _answers(self, model, in_step: bool) -> list[str]:
        attention, written = model.config._attn_implementation, [[] for _ in self.prompts]  # private, as in packing
        ends = end_ids(model, self.tokenizer)
        if attention == SEGMENTS:
            set_attention(model, library_attention(model))
        try:
            for step in decode(model, self.prompts, frozenset() if in_step else ends, GREEDY):
                for row, token in step:
                    written[row].append(token)
        finally:
            if attention == SEGMENTS:
                set_attention(model, SEGMENTS)
        written = [takewhile(lambda token: token not in ends, ids) for ids in written]
        return ["".join(cut_at(decode_pieces(self.tokenizer, ids), STOP)) for ids in written]

    def shown(self) -> list[dict]:
        """Return each prompt with its answer at each step; those of earlier sessions are in a checkpoint's log."""
        found = []
        for n, text in enumerate(self.texts):
            log = [entry for entry in self.trainer.state.log_history if KEY.format(n) in entry]
            answers = {entry["step"]: entry[KEY.format(n)].removeprefix(text + ANSWER) for entry in log}
            found.append({"prompt": text, "answers": [{"step": s, "answer": answer} for s, answer in answers.items()]})
        return [sample for sample in found if sample["answers"]]
