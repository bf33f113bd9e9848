"""`worldloom/World-v0` in Gymnasium's registry. Needs no torch.

    import gymnasium, worldloom.pipelines  ->  gymnasium.make("worldloom/World-v0", world=...)

Without the second import, `gymnasium.make("worldloom.pipelines:worldloom/World-v0", ...)` does the
same. The environment itself is imported when the first one is made.
"""

from gymnasium.envs.registration import register, registry

WORLD_ID = "worldloom/World-v0"

if WORLD_ID not in registry:
    register(
        WORLD_ID,
        entry_point=f"{__package__}.world_env:WorldEnv",
        vector_entry_point=f"{__package__}.world_vector_env:WorldVectorEnv",
    )
