"""When what goes on in the background and failed is tried again: later and later."""

FIRST_RETRY_S = 1.0
LAST_RETRY_S = 60.0


def later(delay_s: float) -> float:
    """Seconds to the try after the one that came after `delay_s`."""
    return min(2 * delay_s, LAST_RETRY_S)
