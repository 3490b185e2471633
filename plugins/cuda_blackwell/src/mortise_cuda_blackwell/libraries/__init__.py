"""Adapters of vendor libraries that only this chip has use for; nothing else imports them."""
