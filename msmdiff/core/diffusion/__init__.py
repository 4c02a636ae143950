"""The mathematics: spaces, noise, masks, losses."""
