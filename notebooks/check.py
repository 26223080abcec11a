"""Compare an exercise's answer with the right one and say what to look at."""

import torch


def check(what, yours, right, hint, rtol=1e-4, atol=1e-5):
    """Print ✓ where yours() equals `right`, ○ where it is not written, ✗ and the hint otherwise.

    yours: a function without arguments. right: a tensor, a number, a text, or a tuple of these.
    Nothing is raised, so that all cells of a notebook run.
    """
    try:
        value = yours()
        written = value is not None and value is not ...
        if written and isinstance(right, (str, bool)):
            assert value == right, f"yours is {value!r}"
        elif written:
            pairs = zip(value, right, strict=True) if isinstance(right, tuple) else [(value, right)]
            for number, (a, b) in enumerate(pairs, 1):
                torch.testing.assert_close(
                    torch.as_tensor(a), torch.as_tensor(b), rtol=rtol, atol=atol, check_dtype=False,
                    msg=lambda text, n=number: f"value {n}: " + " ".join(text.split("\n")[:3]))
    except Exception as error:                       # a student's code may raise anything
        first = (str(error).strip() or "no message").splitlines()[0]
        print(f"✗ {what}: {hint}\n  ({type(error).__name__}: {first})")
    else:
        print(f"✓ {what}" if written else f"○ {what}: not written yet")
