"""Completion in a shell: commands, configurations by name, options."""

from __future__ import annotations

from collections.abc import Sequence

from f2d2_lightning.cli._configs import OPTIONS, UsageError, config_names

# options are asked of the command itself, once in a shell: that takes as long as the command takes to start
_BASH = """_f2d2() {
  local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD-1]} command=${COMP_WORDS[1]} IFS=$' \\t\\n'
  if ((COMP_CWORD == 1)); then
    COMPREPLY=($(compgen -W "COMMANDS" -- "$word"))
  elif [[ " OPTIONS " == *" $before "* ]]; then
    COMPREPLY=($(compgen -W "CONFIGS" -- "$word") $(compgen -f -- "$word"))
  elif [[ $word == -* && " COMMANDS " == *" $command "* ]]; then
    local known=_f2d2_options_$command
    if [[ -z ${!known} ]]; then
      printf -v "$known" %s "$(f2d2 "$command" --help 2>/dev/null | grep -oE -- '--[a-z][a-z0-9_.]*' | sort -u)"
    fi
    COMPREPLY=($(compgen -W "${!known}" -- "$word"))
  else
    COMPREPLY=($(compgen -f -- "$word"))
  fi
}
complete -o filenames -F _f2d2 f2d2"""


def completion(shell: str, commands: Sequence[str]) -> str:
    """Code that teaches ``"bash"`` or ``"zsh"`` to complete the commands, for ``eval "$(f2d2 completion bash)"``."""
    if shell not in ("bash", "zsh"):
        raise UsageError(f"there is no completion for {shell!r}; f2d2 completion bash, or zsh")
    words = {"COMMANDS": commands, "OPTIONS": OPTIONS, "CONFIGS": list(config_names())}
    code = _BASH
    for name, values in words.items():
        code = code.replace(name, " ".join(values))
    return code if shell == "bash" else f"autoload -Uz compinit bashcompinit && compinit && bashcompinit\n{code}"
