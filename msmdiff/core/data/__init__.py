"""Images in: where they come from, which one when, and how they reach the device."""
