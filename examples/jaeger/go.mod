module otelexec.example/jaeger

go 1.25

// v1.76.0 is the commit of Jaeger v2.13.0: the path of the v2 tags lacks the /v2 that Go asks for.
require github.com/jaegertracing/jaeger v1.76.0

// Jaeger's own replace; Go ignores those of dependencies, and the build fails without it.
replace github.com/Shopify/sarama => github.com/Shopify/sarama v1.33.0
