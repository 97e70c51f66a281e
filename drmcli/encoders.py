"""Which text encoders a reward model is asked through: those it was trained with, shared with a generator where they are the same."""

from __future__ import annotations

from drmcli.errors import DrmError
from drmcli.fingerprints import of_parts
from drmcli.generator import Generator
from drmcli.reward import RewardModel


def share(reward: RewardModel, generator: Generator) -> str | None:
    """Make `reward.generator()` the given generator where its prompts' embeddings are those of the training, else load what differs.

    Folders and ids say nothing: what the encoders compute is compared, whether T5 is there, and its length. Returns what a user must
    know: that encoders were loaded in addition, or that the training's own cannot be had and the scores will be somewhat off.
    """
    if reward.own_encoders:
        return None
    try:
        facts = differences(reward, generator.prints(reward.family.text), generator.max_sequence_length)
    except DrmError as error:  # a reward model with weights of its own can do without its base, but not as well
        reward.use_encoders(generator)
        return f"the encoders that the reward model was trained with cannot be had ({error.message}); it is asked with the generator's"
    if not facts:
        reward.use_encoders(generator)
        return None
    reward.generator(beside=generator)
    return f"the reward model was trained with other prompt embeddings ({', '.join(facts)}); its own encoders are loaded too"


def differences(reward: RewardModel, prints: dict[str, str], length: int) -> list[str]:
    """How the embeddings of a reward model's training differ from those of encoders with these prints, in words."""
    c = reward.config
    names = [name for name in reward.family.text if c.text_encoder_3 or not name.endswith("_3")]
    trained = of_parts(c.base_model, c.base_revision, names, flag="base_model", bits=reward.kernels.quantize)
    facts = []
    if ("text_encoder_3" in trained) != ("text_encoder_3" in prints):
        facts.append("with T5" if "text_encoder_3" in trained else "without T5")
    shared = trained.keys() & prints.keys()
    if any(trained[name] != prints[name] for name in shared) or not shared:
        facts.append(f"encoders of {c.base_model}")
    if c.max_sequence_length != length:
        facts.append(f"{c.max_sequence_length} tokens, not {length}")
    return facts
