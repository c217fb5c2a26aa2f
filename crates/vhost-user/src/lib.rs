//! The vhost-user protocol: typed messages, back-end and front-end endpoints.
